"""Sums, peaks and Gram matrices over rows, those of experts too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import inputs
from jax import lax

from jaxquant.intercept._rows import gram, Grouped, largest, SLICE, total

HIGHEST = lax.Precision.HIGHEST
ROWS = 3 * SLICE + 17
# Ends on the cuts between slices and off them, experts without rows, rows that belong to none.
SIZES = (
    (ROWS,),
    (SLICE, SLICE, SLICE, 17),
    (SLICE - 1, 0, 2, 2 * SLICE, 0),
    (0, 0, 5, 100),
    (0, 0),
)


def _grouped(sizes):
    return Grouped(rows=inputs(ROWS, 4), sizes=jnp.asarray(sizes, jnp.int32))


def _parts(x):
    ends = np.cumsum(x.sizes)
    return [np.asarray(x.rows[end - n : end]) for end, n in zip(ends, x.sizes, strict=True)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_loop_over_experts_gives_the_same(sizes):
    x = _grouped(sizes)
    found = jax.jit(lambda x: (gram(x, HIGHEST), total(x, x.rows), largest(x, x.rows, -9.0)))(x)
    for i, part in enumerate(_parts(x)):
        want = part.T @ part, part.sum(0), part.max(0, initial=-9)
        for got, wanted in zip(found, want, strict=True):
            np.testing.assert_array_equal(got[i], wanted)


def test_the_group_of_each_row():
    x = Grouped(rows=inputs(7, 2), sizes=jnp.asarray([2, 0, 3], jnp.int32))
    np.testing.assert_array_equal(x.groups, [0, 0, 2, 2, 2, 3, 3])
    np.testing.assert_array_equal(x.belongs, [True] * 5 + [False] * 2)


def test_sizes_that_claim_more_rows_than_there_are():
    """As `lax.ragged_dot` takes them: the rows there are."""
    x = Grouped(rows=inputs(7, 2), sizes=jnp.asarray([5, 9], jnp.int32))
    parts = np.split(np.asarray(x.rows), [5])
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(gram(x, HIGHEST)[i], part.T @ part)
        np.testing.assert_array_equal(total(x, x.rows)[i], part.sum(0))


def test_the_work_does_not_grow_with_the_number_of_experts_times_rows():
    """As many slices as fill the rows, and one more for each expert."""

    def slices(experts):
        x = Grouped(rows=inputs(ROWS, 4), sizes=jnp.full(experts, 1, jnp.int32))
        jaxpr = jax.make_jaxpr(lambda x: gram(x, HIGHEST))(x).jaxpr
        (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
        return scan.params["length"]

    assert slices(1) == 4 and slices(64) == 67


@pytest.mark.parametrize("grouped", [False, True])
def test_a_peak_with_nan_is_nan(grouped):
    # As wide as a maximum must be for a compiler to hand it to a library.
    rows = jnp.ones((64, 256)).at[40, 7].set(jnp.nan)
    x = Grouped(rows=rows, sizes=jnp.asarray([64])) if grouped else rows
    found = np.asarray(jax.jit(lambda x: largest(x, rows, 0.0))(x)).reshape(256)
    assert np.isnan(found[7]) and (np.delete(found, 7) == 1).all()


def test_no_rows():
    none = inputs(0, 3)
    np.testing.assert_array_equal(largest(none, none, -1.0), [-1.0] * 3)
    np.testing.assert_array_equal(total(none, none), [0.0] * 3)
    x = Grouped(rows=none, sizes=jnp.asarray([0, 0]))
    np.testing.assert_array_equal(gram(x, HIGHEST), np.zeros((2, 3, 3)))
