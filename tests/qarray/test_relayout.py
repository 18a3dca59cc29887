import jax
import numpy as np
import pytest
from quantized import codes_of, layouts, same_bits, SCHEMES, uneven, values

from jaxquant.numerics import FLOAT32, INT8, MinMax, UINT8
from jaxquant.qarray import (
    CANONICAL,
    check_qarray,
    dequantize,
    Layout,
    PER_CHANNEL,
    quantize_array,
    relayout,
    Scheme,
)
from jaxquant.qarray._qarray import scale_values, with_plain_scale

TABLE = [
    pytest.param(scheme, layout, id=f"{name} {layout}")
    for name, scheme in SCHEMES.items()
    for layout in layouts(scheme, first=256, last=128)
]


@pytest.mark.parametrize("scheme, layout", TABLE)
def test_every_layout_holds_the_same_values_and_leads_back(scheme: Scheme, layout: Layout):
    """Scales that are held as codes become float32 where their order changes; see the next test."""
    q = codes_of(scheme, 256, 128)
    p = relayout(q, layout)
    check_qarray(p)
    assert (p.shape, p.tile, p.layout) == (q.shape, q.tile, layout)
    np.testing.assert_array_equal(values(p), values(q))
    assert same_bits(dequantize(p), dequantize(q))
    if layout.order is not None:
        q = with_plain_scale(q)
    assert p.nbytes == q.nbytes
    back = relayout(p, CANONICAL)
    assert jax.tree.structure(back) == jax.tree.structure(q)
    assert all(map(same_bits, jax.tree.leaves(back), jax.tree.leaves(q)))


@pytest.mark.parametrize("name", ["nvfp4", "nf4 double"])
def test_scales_held_as_codes_stay_so_unless_their_order_changes(name: str):
    q = codes_of(SCHEMES[name], 256, 128)
    assert relayout(q, Layout(packed=32)).scale is q.scale
    moved = relayout(q, Layout(order=(-1, -2)))
    assert moved.scheme.scale == FLOAT32 and moved.scale.dtype == np.float32
    np.testing.assert_array_equal(moved.scale, np.asarray(scale_values(q)).T)


def test_any_layout_is_reached_from_any_other():
    scheme = SCHEMES["int4 zero g64"]
    q = codes_of(scheme, 3, 256, 128, contracted=(1,), stack=(0,))
    wanted = [*layouts(scheme, first=256, last=128), Layout(order=(-2, -1, -3), packed=None)]
    for start in wanted:
        p = relayout(q, start)
        for end in wanted:
            r = relayout(p, end)
            direct = relayout(q, end)
            assert r.layout == end
            assert all(map(same_bits, jax.tree.leaves(r), jax.tree.leaves(direct))), (start, end)


@pytest.mark.parametrize("name", ["int4 channel", "int3 g32", "binary", "nvfp4"])
def test_packed_codes_take_as_many_bits_as_they_have(name: str):
    q = codes_of(SCHEMES[name], 256, 128)
    assert relayout(q, Layout(packed=128)).codes.nbytes == 256 * 128 * q.scheme.values.bits // 8
    if q.scheme.values.integer:
        assert relayout(q, Layout(wide=True)).codes.nbytes == 256 * 128


def test_layouts_that_do_not_fit_are_refused():
    q = quantize_array(uneven(256, 128), Scheme(values=INT8, tile=PER_CHANNEL), contracted=(0,))
    with pytest.raises(ValueError, match="Codes of INT8 fill whole bytes; there is nothing to"):
        relayout(q, Layout(packed=2))
    q = codes_of(SCHEMES["int4 channel"], 256, 129)
    with pytest.raises(ValueError, match="axis of 129 codes of INT4 cannot be packed"):
        relayout(q, Layout(packed=2))
    q = codes_of(SCHEMES["e4m3 channel"], 256, 128)
    with pytest.raises(ValueError, match="Wide codes are integers that fit int8; .* holds E4M3"):
        relayout(q, Layout(wide=True))
    scheme = Scheme(values=UINT8, tile=PER_CHANNEL, range=MinMax(), zero_point=UINT8)
    with pytest.raises(ValueError, match="that fit int8; this array holds UINT8"):
        relayout(quantize_array(uneven(4, 8), scheme), Layout(wide=True))
