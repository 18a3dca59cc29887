"""Statistics add up: over batches, and with nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.intercept import Gram, Moments, Peak

OBSERVERS = pytest.mark.parametrize("observer", [Moments(), Peak(), Gram()], ids=lambda o: o.name)
FIRST = jax.random.normal(jax.random.key(0), (3, 7, 5))
SECOND = jax.random.normal(jax.random.key(1), (3, 4, 5))


@OBSERVERS
def test_statistics_of_two_batches_merge_into_those_of_both(observer):
    merged = observer.merge(observer.measure(FIRST), observer.measure(SECOND))
    both = observer.measure(jnp.concatenate([FIRST, SECOND], axis=1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), merged, both)


@OBSERVERS
def test_what_is_empty_adds_nothing(observer):
    stats = observer.measure(FIRST)
    shapes = jax.eval_shape(observer.measure, FIRST)
    merged = observer.merge(observer.empty(shapes), stats)
    jax.tree.map(np.testing.assert_array_equal, merged, stats)


@OBSERVERS
def test_stack_axes_stay_apart(observer):
    together = observer.measure(FIRST)
    apart = [observer.measure(x) for x in FIRST]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *apart)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), together, stacked)


@OBSERVERS
def test_devices_reduce_to_the_statistics_of_all_rows(observer):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.random.normal(jax.random.key(2), (8, 5))
    spec = jax.sharding.PartitionSpec

    def local(x):
        return jax.tree.map(lambda s: observer.reduce(s, ("data",)), observer.measure(x))

    reduced = jax.shard_map(local, mesh=mesh, in_specs=spec("data"), out_specs=spec())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.jit(reduced)(rows),
        observer.measure(rows),
    )


def test_each_measures_what_its_name_says():
    x = FIRST[0]
    moments = Moments().measure(x)
    np.testing.assert_allclose(moments["rows"], 7.0)
    np.testing.assert_allclose(moments["magnitude"], np.abs(x).sum(0), rtol=1e-6)
    np.testing.assert_allclose(moments["square"], np.square(x).sum(0), rtol=1e-6)
    np.testing.assert_array_equal(Peak().measure(x), np.abs(x).max(0))
    np.testing.assert_allclose(Gram().measure(x), np.asarray(x).T @ np.asarray(x), rtol=1e-5)
