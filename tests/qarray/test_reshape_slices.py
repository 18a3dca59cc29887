import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import codes_of, layouts, SCHEMES, values

from jaxquant.qarray import check_qarray, Layout, QArray, relayout, slice_axis
from jaxquant.qarray._reshape import dynamic_index, squeeze

SCHEME = SCHEMES["int4 zero g64"]


def _weight(layout: Layout) -> QArray:
    """Three stacked 256 x 128 weights in groups of 64."""
    q = codes_of(SCHEME, 3, 256, 128, contracted=(1,), stack=(0,))
    return relayout(q, layout)


EVERY_LAYOUT = layouts(SCHEME, first=256, last=128)
every_layout = pytest.mark.parametrize("layout", EVERY_LAYOUT, ids=str)

INDICES = {
    "q[1]": np.s_[1],
    "q[-1]": np.s_[-1],
    "q[1:]": np.s_[1:],
    "q[:2, 64:192]": np.s_[:2, 64:192],
    "q[2, :128]": np.s_[2, :128],
    "q[..., 5:5]": np.s_[..., 0:0],
    "q[..., :]": np.s_[..., :],
    "q[0, ..., :]": np.s_[0, ..., :],
    "q[np.int64(2)]": np.s_[np.int64(2)],
    "q[:, -64:]": np.s_[:, -64:],
    "q[:, 64:1000]": np.s_[:, 64:1000],
}


@pytest.mark.parametrize("index", INDICES)
@every_layout
def test_an_index_is_that_of_the_array(layout: Layout, index: str):
    q = _weight(layout)
    got = q[INDICES[index]]
    expected = values(q)[INDICES[index]]
    assert got.shape == expected.shape
    if expected.size:
        check_qarray(got)
        np.testing.assert_array_equal(values(got), expected)


UNPACKED = [layout for layout in EVERY_LAYOUT if layout.packed is None]


@pytest.mark.parametrize("layout", UNPACKED, ids=str)
def test_columns_are_sliced_anywhere_since_each_has_its_own_scale(layout: Layout):
    q = _weight(layout)
    np.testing.assert_array_equal(values(q[:, :, 3:7]), values(q)[:, :, 3:7])
    np.testing.assert_array_equal(values(q[1, 64:128, 5]), values(q)[1, 64:128, 5])


def test_a_packed_axis_is_sliced_at_its_blocks():
    q = _weight(Layout(packed=32))
    np.testing.assert_array_equal(values(q[..., 32:96]), values(q)[..., 32:96])
    with pytest.raises(ValueError, match=r"\[16:32\] of axis 2 cuts packed blocks of 32.*relayout"):
        q[..., 16:32]
    with pytest.raises(ValueError, match="cuts packed blocks"):
        q[..., 5]
    one = jnp.asarray(0)
    with pytest.raises(ValueError, match="tiles of 1 and is packed"):
        q[..., one]


def test_a_whole_tile_may_be_cut_to_part_of_itself():
    """One scale for a whole axis still holds for some of its elements."""
    q = codes_of(SCHEMES["int8 channel"], 256, 128)
    np.testing.assert_array_equal(values(q[3:10]), values(q)[3:10])
    np.testing.assert_array_equal(values(q[7]), values(q)[7])


REFUSED = [
    (np.s_[:, 32:64], ValueError, r"\[32:64\] of axis 1 cuts tiles of 64.*multiples of 64.*retile"),
    (np.s_[:, 64:65], ValueError, "cuts tiles of 64"),
    (np.s_[:, 5], ValueError, "cuts tiles of 64"),
    (np.s_[::2], ValueError, "sliced with step 1, not 2"),
    (np.s_[::-1], ValueError, "sliced with step 1, not -1"),
    (np.s_[3], IndexError, "out of range"),
    (np.s_[0, 0, 0, 0], IndexError, "4 indices for a QArray of 3 axes"),
    (np.s_[[0, 1]], TypeError, "integers, slices and ..., not list.*jaxquant.take"),
    (np.s_[jnp.asarray([0, 1])], TypeError, "to look up rows"),
    (np.s_[None], TypeError, "not NoneType"),
]


@pytest.mark.parametrize("index, error, message", REFUSED)
def test_an_index_that_cannot_be_taken_is_refused(index, error: type, message: str):
    with pytest.raises(error, match=message):
        _weight(Layout())[index]


@every_layout
def test_a_traced_index_takes_one_of_a_stack(layout: Layout):
    q = _weight(layout)
    one = jax.jit(lambda q, i: q[i])
    for i in range(3):
        got = one(q, i)
        check_qarray(got)
        np.testing.assert_array_equal(values(got), values(q)[i])


@every_layout
def test_a_traced_start_is_clamped_as_in_lax(layout: Layout):
    q = _weight(layout)
    some = jax.jit(lambda q, i: dynamic_index(q, 0, i, 2))
    for start, first in [(0, 0), (1, 1), (2, 1), (9, 1)]:
        np.testing.assert_array_equal(values(some(q, start)), values(q)[first : first + 2])
    np.testing.assert_array_equal(values(dynamic_index(q, 0, 7, 3)), values(q))


def test_a_traced_start_within_tiles_is_refused():
    with pytest.raises(ValueError, match="tiles of 1 along axis 1, which has tiles of 64"):
        dynamic_index(_weight(Layout()), 1, jnp.asarray(0), 64)


def test_slices_work_under_jit_and_cost_no_dequantizing():
    q = _weight(Layout(order=(-1, -2), packed=32))
    compiled = jax.jit(lambda q: slice_axis(q, 1, 64, 192)).lower(q).compile()
    np.testing.assert_array_equal(values(compiled(q)), values(q)[:, 64:192])
    assert "f32[3,256,128]" not in compiled.as_text()


def test_the_packed_axis_is_not_dropped():
    q = codes_of(SCHEMES["int4 channel"], 256, 2)
    p = relayout(q, Layout(packed=2))
    with pytest.raises(ValueError, match="packed axis cannot be dropped.*relayout"):
        squeeze(p, (1,))
