"""The state machine of delayed scaling, case by case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.numerics import E4M3, E5M2
from jaxquant.training import Delayed, first_delayed, moved_scale, peaks_by_tile

END = np.float32(1 / 448)


THREE = Delayed(history=3)


def after(peaks, delayed=THREE, format=E4M3):
    """Scale and history after steps that saw these magnitudes."""
    held = first_delayed(delayed, format, (1,))
    for peak in peaks:
        held = moved_scale(delayed, format, held, jnp.array([peak], jnp.float32))
    return np.asarray(held["scale"])[0], np.asarray(held["peaks"])[0].tolist()


def test_the_newest_goes_to_the_front_and_the_oldest_falls_out():
    _, peaks = after([1.0, 2.0, 4.0, 8.0])
    assert peaks == [8.0, 4.0, 2.0]


@pytest.mark.parametrize(
    ("peaks", "largest"),
    [([1.0, 8.0, 2.0], 8.0), ([8.0, 1.0, 2.0, 4.0], 4.0), ([2.0, 0.0, 0.0], 2.0)],
)
def test_the_scale_is_that_of_the_largest_of_the_history(peaks, largest):
    assert after(peaks)[0] == np.float32(largest) * END


def test_the_latest_alone_if_so_said():
    assert after([8.0, 2.0], Delayed(history=3, latest=True))[0] == np.float32(2.0) * END


def test_a_margin_leaves_room():
    assert after([8.0], Delayed(margin=2))[0] == np.float32(32.0) * END
    assert after([8.0], Delayed(), E5M2)[0] == np.float32(8.0 / 57344)


def test_a_zero_enters_and_the_scale_stays_when_all_is_zero():
    scale, peaks = after([4.0, 0.0, 0.0, 0.0])
    assert peaks == [0.0, 0.0, 0.0]
    assert scale == np.float32(4.0) * END


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_leaves_the_scale_and_is_forgotten(bad):
    scale, peaks = after([4.0, 2.0, bad])
    assert scale == np.float32(4.0) * END
    assert peaks == [0.0, 2.0, 4.0]
    # The step after it goes on as if it had not been.
    assert after([4.0, 2.0, bad, 1.0])[0] == np.float32(2.0) * END


def test_the_scale_is_one_before_anything_is_seen():
    assert after([])[0] == 1.0
    assert after([0.0, np.nan])[0] == 1.0


def test_the_least_magnitudes_have_a_scale_whose_reciprocal_is_finite():
    scale, _ = after([1e-37])
    assert scale > 0 and np.isfinite(np.float32(1) / scale)
    assert np.isfinite(after([3e38])[0])


def test_each_tile_and_layer_has_its_own():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(peaks_by_tile(x, (1, 3, 4)), [[[11.0]], [[23.0]]])
    held = first_delayed(Delayed(history=2), E4M3, (2, 1))
    held = jax.jit(lambda h, p: moved_scale(Delayed(history=2), E4M3, h, p))(
        held, jnp.array([[1.0], [jnp.nan]])
    )
    np.testing.assert_array_equal(held["scale"], [[END], [1.0]])


def test_a_history_has_a_length():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Delayed(history=0)
