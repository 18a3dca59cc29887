"""Observers: statistics that add up over batches and devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import inputs
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

import jaxquant as jq
from jaxquant.intercept import Count, Extremes, Histogram, mean_magnitude, nonfinite
from jaxquant.intercept._rows import Grouped

OBSERVERS = (
    Count(),
    jq.observers.Moments(),
    jq.observers.Peak(),
    Extremes(),
    jq.observers.Gram(),
    Histogram(),
)
every_observer = pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: o.name)
# Of different sizes, yet with sums of squares that float32 holds.
A, B, C = inputs(5, 6), 16 * inputs(3, 6, seed=2), inputs(2, 6, seed=3) / 16
MESH = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
# An expert without rows, all rows to one, rows beyond the last group, all beyond.
SIZES = ((2, 0, 3), (5, 0, 0), (0, 1, 2), (0, 0, 0))


def _assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def _measured(observer, *parts):
    return jax.jit(observer.measure)(jnp.concatenate(parts))


@every_observer
def test_statistics_of_batches_are_those_of_all_rows_in_whatever_order(observer):
    parts = [_measured(observer, x) for x in (A, B, C)]
    want = _measured(observer, A, B, C)
    for a, b, c in itertools.permutations(parts):
        _assert_equal(observer.merge(observer.merge(a, b), c), want)
        _assert_equal(observer.merge(a, observer.merge(b, c)), want)


@every_observer
def test_nothing_seen_changes_nothing(observer):
    seen = observer.measure(A)
    nothing = observer.empty(jax.eval_shape(lambda: seen))
    _assert_equal(observer.merge(nothing, seen), seen)
    _assert_equal(observer.merge(seen, nothing), seen)
    _assert_equal(observer.measure(A[:0]), nothing)


@every_observer
def test_a_stack_is_measured_slice_by_slice(observer):
    stack = jnp.stack([A, A + 1, 2 * A])
    _assert_equal(observer.measure(stack), jax.vmap(observer.measure)(stack))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@every_observer
def test_experts_see_their_own_rows(observer, sizes):
    rows = jnp.concatenate([A[:2], B])
    got = jax.jit(observer.measure)(Grouped(rows=rows, sizes=jnp.asarray(sizes, jnp.int32)))
    ends = np.cumsum(sizes)
    want = [observer.measure(rows[e - n : e]) for e, n in zip(ends, sizes, strict=True)]
    _assert_equal(got, jax.tree.map(lambda *parts: jnp.stack(parts), *want))


@every_observer
def test_devices_add_up(observer):
    parts = jnp.concatenate([A[:2], B[:2], C, A[2:4]])

    def body(x):
        return observer.reduce(observer.measure(x), ("d",))

    run = jax.shard_map(body, mesh=MESH, in_specs=P("d"), out_specs=P())
    got = jax.jit(run)(parts)
    _assert_equal(got, _measured(observer, parts))


@every_observer
def test_devices_add_up_experts_too(observer):
    """Each device deals out its own rows to all experts."""
    parts = jnp.concatenate([A[:2], B[:2], C, A[2:4]])
    sizes = jnp.asarray([[1, 1], [0, 2], [2, 0], [0, 1]], jnp.int32)

    def body(x, sizes):
        return observer.reduce(observer.measure(Grouped(rows=x, sizes=sizes[0])), ("d",))

    run = jax.shard_map(body, mesh=MESH, in_specs=P("d"), out_specs=P())
    got = jax.jit(run)(parts, sizes)
    order = jnp.asarray([0, 4, 5, 1, 2, 3, 6])
    _assert_equal(
        got, observer.measure(Grouped(rows=parts[order], sizes=jnp.asarray([3, 4], jnp.int32)))
    )


def test_what_is_measured_by_hand():
    x = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    count, moments, peak, extremes, gram, _ = (o.measure(x) for o in OBSERVERS)
    _assert_equal(count, {"rows": 2, "nonfinite": 0})
    _assert_equal(moments, {**count, "magnitude": [4.0, 2.5], "square": [10.0, 4.25]})
    _assert_equal(peak, [3.0, 2.0])
    _assert_equal(extremes, {"low": [1.0, -2.0], "high": [3.0, 0.5]})
    _assert_equal(gram, [[10.0, -0.5], [-0.5, 4.25]])
    np.testing.assert_array_equal(mean_magnitude(moments), [2.0, 1.25])


def test_the_mean_of_nothing_is_0():
    moments = jq.observers.Moments().measure(Grouped(rows=A, sizes=jnp.asarray([0, 5])))
    np.testing.assert_array_equal(moments["rows"], [0, 5])
    np.testing.assert_array_equal(mean_magnitude(moments)[0], np.zeros(6))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("grouped", [False, True])
def test_values_that_are_not_finite_are_told(value, grouped):
    x = jnp.ones((40, 70)).at[3, 4].set(value).at[3, 69].set(value)
    x = Grouped(rows=x, sizes=jnp.asarray([20, 20])) if grouped else x
    found = {o.name: jax.jit(o.measure)(x) for o in OBSERVERS}
    for name, each in (("count", 1), ("moments", 1), ("histogram", 2)):
        np.testing.assert_array_equal(found[name]["nonfinite"], [each, 0] if grouped else each)
    assert nonfinite({"a#dot": {"count": found["count"]}}) == {"a#dot": 1}
    # Nothing is left out of the other statistics.
    ends = found["extremes"]
    for seen in (
        found["peak"],
        found["moments"]["magnitude"],
        ends["low" if value < 0 else "high"],
    ):
        assert not np.isfinite(np.asarray(seen).reshape(-1, 70)[0, 4])
        assert np.isfinite(np.asarray(seen).reshape(-1, 70)[0, 5])
    assert not np.isfinite(np.asarray(found["gram"]).reshape(-1, 70, 70)[0, 4]).any()


def test_a_site_that_nobody_watched_for_that_is_an_error():
    with pytest.raises(ValueError, match=r"a#dot .* it has gram\. Observe with Count\(\)"):
        nonfinite({"a#dot": {"gram": jq.observers.Gram().measure(A)}})


def test_finite_sites_are_not_named():
    assert nonfinite({"a#dot": {"moments": jq.observers.Moments().measure(A)}}) == {}


def test_the_precision_of_products_can_be_chosen():
    def precisions(observer):
        eqns = jax.make_jaxpr(observer.measure)(A).jaxpr.eqns
        return {e.params["precision"] for e in eqns if e.primitive.name == "dot_general"}

    both = {(lax.Precision.HIGHEST,) * 2}
    assert precisions(jq.observers.Gram()) == both
    assert precisions(jq.observers.Gram(precision=lax.Precision.DEFAULT)) == {
        (lax.Precision.DEFAULT,) * 2
    }
