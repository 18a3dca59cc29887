"""Columns of weights that are kept for the outliers that they meet."""

import jax.numpy as jnp
import numpy as np
from quantized import normal

from jaxquant.algorithms import known_outliers
from jaxquant.ops import Outliers

K = 8


def test_columns_that_reach_the_threshold_are_kept_as_they_are():
    w, peak = normal(5, K), jnp.asarray([1.0, 6.0, 2.0, 90.0, 5.9, 0.0, 7.0, 1.0])
    found = known_outliers(w, peak, Outliers())
    assert found["outlier_columns"].tolist() == [3, 6, 1]
    np.testing.assert_array_equal(found["outlier_weights"], w.T[jnp.asarray([3, 6, 1])])


def test_slices_with_fewer_are_filled_with_places_that_are_none():
    w = normal(3, 5, K).astype(jnp.bfloat16)
    peak = jnp.zeros((3, K)).at[0, 2].set(8.0).at[2, 1].set(9.0).at[2, 7].set(8.0)
    found = known_outliers(w, peak, Outliers())
    assert found["outlier_columns"].tolist() == [[2, K], [K, K], [1, 7]]
    weights = found["outlier_weights"]
    assert weights.shape == (3, 2, 5) and weights.dtype == jnp.bfloat16
    np.testing.assert_array_equal(weights[0, 0], w[0, :, 2])
    np.testing.assert_array_equal(weights[2, 1], w[2, :, 7])
    assert not weights[1].any() and not weights[0, 1].any()


def test_one_place_is_kept_where_there_are_no_outliers():
    found = known_outliers(normal(5, K), jnp.zeros(K), Outliers())
    assert found["outlier_columns"].tolist() == [K]
