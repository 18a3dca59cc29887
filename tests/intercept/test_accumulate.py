"""Sums of statistics that are equal to the bit for one device and for several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxquant as jq
from jaxquant.intercept import Histogram
from jaxquant.intercept._accumulate import emptied, merged, over_units, ungrouped
from jaxquant.intercept._shared import share, unshare

OBSERVERS = (
    jq.observers.Gram(),
    jq.observers.Moments(),
    jq.observers.Peak(),
    Histogram(per_octave=4, octaves=8),
)
AUTO = (AxisType.Auto,)
MESH = jax.make_mesh((4,), ("data",), axis_types=AUTO)
D, ROWS, WINDOWS = 24, 40, 24
W = jax.random.normal(jax.random.key(0), (D, D))
X = jax.random.normal(jax.random.key(1), (WINDOWS, ROWS, D)) * jnp.exp(
    jnp.arange(WINDOWS, dtype=jnp.float32) / 4
).reshape(-1, 1, 1)


def _run(w, x):
    """A layer of its inputs, and the statistics of two sites that read it and of one that does not.

    The scan starts with zeros: such models know nothing of what varies over devices.
    """
    rows = x.reshape(-1, D)
    out, _ = lax.scan(lambda c, w: (c + jnp.tanh(x @ w), None), jnp.zeros(x.shape), w[None])
    own = {o.name: o.measure(rows) for o in OBSERVERS}
    return out, {"q": own, "k": own, "o": {"gram": jq.observers.Gram().measure(out.reshape(-1, D))}}


def _total(batches, mesh=None, **kwargs):
    step = functools.partial(over_units, _run, observers=OBSERVERS, unit=2, mesh=mesh, **kwargs)
    step = jax.jit(step)
    total, outs = None, []
    for batch in batches:
        out, total = step(W, batch, total)
        outs.append(out)
    return jnp.concatenate(outs), unshare(total)


def _equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


ONE = _total([X])

BATCHES = {
    "one batch": [24],
    "whole rounds": [8, 16],
    "units left over": [12, 12],
    "fewer units than devices": [4, 2, 18],
}


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("name", BATCHES)
def test_the_total_is_the_same_to_the_bit(name, devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=AUTO, devices=jax.devices()[:devices])
    ends = np.cumsum(BATCHES[name])[:-1]
    _equal(_total(jnp.split(X, ends), mesh), ONE)


def test_windows_left_over_are_a_smaller_unit():
    """Devices do not matter; where the batches end does, for these are other units."""
    want = _total([X[:13], X[13:]])
    _equal(_total([X[:13], X[13:]], MESH), want)
    out, stats = _run(W, X)
    # Sums in another order, before a tanh that moves no further than they do.
    reach = D * 2.0**-23 * float((jnp.abs(X) @ jnp.abs(W)).max())
    np.testing.assert_allclose(want[0], out, rtol=0, atol=reach)
    np.testing.assert_array_equal(want[1]["q"]["moments"]["rows"], WINDOWS * ROWS)
    np.testing.assert_array_equal(want[1]["q"]["peak"], stats["q"]["peak"])


def test_it_is_the_sum_in_the_order_of_the_windows():
    total = np.zeros((D, D), np.float32)
    for i in range(0, WINDOWS, 2):
        total = total + np.asarray(jax.jit(_run)(W, X[i : i + 2])[1]["q"]["gram"])
    np.testing.assert_array_equal(ONE[1]["q"]["gram"], total)
    # In another order the last bits differ, or this would show nothing.
    other = _total([X[::-1]])[1]["q"]["gram"]
    assert not np.array_equal(other, total)


@pytest.mark.parametrize("placed", ["sharded", "on one device", "in NumPy"])
def test_where_the_batch_lies_changes_nothing(placed):
    x = {
        "sharded": lambda: jax.device_put(X, NamedSharding(MESH, P("data"))),
        "on one device": lambda: X,
        "in NumPy": lambda: np.asarray(X),
    }[placed]()
    out, total = jax.jit(
        functools.partial(over_units, _run, observers=OBSERVERS, unit=2, mesh=MESH)
    )(W, x, None)
    _equal((out, unshare(total)), ONE)


def test_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    _equal(_total([X], mesh, axis="rows"), ONE)


def test_other_axes_of_a_mesh_do_the_same_again():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=AUTO * 2)
    _equal(_total([X], mesh), ONE)


def test_what_sites_share_is_held_once():
    step = functools.partial(over_units, _run, observers=OBSERVERS, unit=2, mesh=MESH)
    _, total = jax.jit(step)(W, X, None)
    own = len(jax.tree.leaves(_run(W, X[:2])[1]["q"]))
    assert len(total.arrays) == own + 1
    found = unshare(total)
    assert found["q"]["gram"] is found["k"]["gram"]


@pytest.mark.parametrize(
    "batch, unit",
    [(X[:0], 2), (X, 0), ((X, X[:3]), 2)],
    ids=["empty", "no unit", "two lengths"],
)
def test_what_cannot_be_dealt_out_is_refused(batch, unit):
    with pytest.raises(ValueError, match="Give one window or more"):
        over_units(_run, W, batch, observers=OBSERVERS, unit=unit)


def test_merging_keeps_what_only_one_has():
    a = {"x": {"peak": jnp.ones(2)}, "y": {"peak": jnp.ones(3)}}
    b = {"x": {"peak": 2 * jnp.ones(2), "gram": jnp.ones((2, 2))}}
    found = merged(OBSERVERS, a, b)
    np.testing.assert_array_equal(found["x"]["peak"], [2, 2])
    assert found["y"]["peak"] is a["y"]["peak"] and found["x"]["gram"] is b["x"]["gram"]


def test_nothing_is_as_shared_as_something():
    stats = _run(W, X)[1]
    nothing = emptied(OBSERVERS, stats)
    assert share(nothing).places == share(stats).places
    _equal(merged(OBSERVERS, nothing, stats), stats)


def test_data_parallel_batches_add_up_under_plain_jit():
    """XLA partitions the sums: equal up to their order."""
    from exact import Applied

    model, variables = Applied(jnp.matmul, (D, D)), {"params": {"w": W}}
    x = X.reshape(-1, D)
    want = jq.observe(model, variables, [(x,)], observers=OBSERVERS)["w#dot"]
    sharded = jax.device_put(x, NamedSharding(MESH, P("data")))
    got = jq.observe(model, variables, [(sharded,)], observers=OBSERVERS)["w#dot"]
    for name in ("peak", "histogram"):
        _equal(got[name], want[name])
    bound = len(x) * 2.0**-24 * jnp.abs(x).T @ jnp.abs(x)
    assert (jnp.abs(got["gram"] - want["gram"]) <= bound).all()


@pytest.mark.parametrize("stack", [(), (2,)])
def test_the_groups_of_a_convolution_are_seen_as_one(stack):
    """Statistics of three groups are those of all rows together; a stack is kept."""
    seen = jq.observers
    observers = (seen.Count(), seen.Extremes(), seen.Peak(), OBSERVERS[-1])  # They merge exactly.
    x = X[:6].reshape(*stack, 3, -1, D)
    groups = {o.name: o.measure(x) for o in observers}
    together = {o.name: o.measure(x.reshape(*stack, -1, D)) for o in observers}
    for found, lead in ((groups, len(stack) + 1), (together, len(stack))):
        _equal(ungrouped(observers, found, stack=len(stack), lead=lead), together)
