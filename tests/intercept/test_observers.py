"""Observers: statistics that add up over batches and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import inputs

import jaxquant as jq

OBSERVERS = (jq.Moments(), jq.Peak(), jq.Gram())
every_observer = pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: o.name)
A, B = inputs(5, 6), inputs(3, 6, seed=2)


def _assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@every_observer
def test_statistics_of_batches_add_up_to_those_of_all_rows(observer):
    merged = observer.merge(observer.measure(A), observer.measure(B))
    _assert_equal(merged, observer.measure(jnp.concatenate([A, B])))


@every_observer
def test_nothing_seen_changes_nothing(observer):
    seen = observer.measure(A)
    _assert_equal(observer.merge(observer.empty(jax.eval_shape(lambda: seen)), seen), seen)


@every_observer
def test_a_stack_is_measured_slice_by_slice(observer):
    stack = jnp.stack([A, A + 1, 2 * A])
    _assert_equal(observer.measure(stack), jax.vmap(observer.measure)(stack))


def test_what_is_measured_by_hand():
    x = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    moments, peak, gram = (o.measure(x) for o in OBSERVERS)
    _assert_equal(moments, {"rows": 2.0, "magnitude": [4.0, 2.5], "square": [10.0, 4.25]})
    _assert_equal(peak, [3.0, 2.0])
    _assert_equal(gram, [[10.0, -0.5], [-0.5, 4.25]])
