"""One product with outliers: which elements and columns are kept apart."""

import jax.numpy as jnp
import numpy as np
import pytest
from outlier_products import call_of, CASES

from jaxquant.ops import Outliers


@pytest.mark.parametrize("name", CASES)
def test_rows_and_results_have_the_shapes_of_the_product(name):
    call, case = call_of(name), CASES[name]
    rows = call.rows(call.x)
    batch = [case.x[a] for a in case.batch[0]]
    assert rows.shape[:-2] == tuple(batch) and rows.size == call.x.size
    n = call.dot.rows(1 - call.side)
    assert call.as_result(jnp.zeros((*rows.shape[:-1], n))).size == n * rows.size // rows.shape[-1]


def test_a_column_is_apart_if_one_of_its_elements_is_big():
    call = call_of("matrix")
    x = np.asarray(call.x)
    np.testing.assert_array_equal(call.big(), np.abs(x) >= 6)
    np.testing.assert_array_equal(call.in_columns(call.big()), (np.abs(x) >= 6).any(0)[None])


def test_each_entry_of_a_batch_has_columns_of_its_own():
    call = call_of("batched", known=4)
    assert call.in_columns(call.big()).shape == (1, 3, 32)
    known = np.asarray(call.known())
    for i, columns in enumerate(np.asarray(call.columns)):
        assert set(np.flatnonzero(known[0, i])) == set(columns) - {32}


@pytest.mark.parametrize("threshold, share", [(0.0, 1.0), (float("inf"), 0.0)])
def test_at_the_ends_all_or_no_columns_are_apart(threshold, share):
    call = call_of("matrix", Outliers(threshold=threshold))
    assert float(call.in_columns(call.big()).mean()) == share
