import jax
import numpy as np
import pytest
from quantized import codes_of, layouts, same_bits, SCHEMES, uneven, values

from jaxquant.numerics import INT8
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

TABLE = [
    pytest.param(scheme, layout, id=f"{name} {layout}")
    for name, scheme in SCHEMES.items()
    for layout in layouts(scheme, first=256, last=128)
]


@pytest.mark.parametrize("scheme, layout", TABLE)
def test_every_layout_holds_the_same_values_and_leads_back(scheme: Scheme, layout: Layout):
    q = codes_of(scheme, 256, 128)
    p = relayout(q, layout)
    check_qarray(p)
    assert (p.shape, p.tile, p.nbytes, p.layout) == (q.shape, q.tile, q.nbytes, layout)
    np.testing.assert_array_equal(values(p), values(q))
    np.testing.assert_array_equal(dequantize(p), dequantize(q))
    back = relayout(p, CANONICAL)
    assert jax.tree.structure(back) == jax.tree.structure(q)
    assert all(map(same_bits, jax.tree.leaves(back), jax.tree.leaves(q)))


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


def test_packed_codes_take_half_a_byte():
    q = codes_of(SCHEMES["int4 channel"], 256, 128)
    assert relayout(q, Layout(packed=128)).codes.nbytes == 256 * 128 // 2
    assert relayout(q, Layout(wide=True)).codes.nbytes == 256 * 128


def test_layouts_that_do_not_fit_are_refused():
    q = quantize_array(uneven(256, 128), Scheme(values=INT8, tile=PER_CHANNEL), contracted=(0,))
    with pytest.raises(ValueError, match="need a 4-bit integer format; this array holds INT8"):
        relayout(q, Layout(packed=2))
    q = codes_of(SCHEMES["int4 channel"], 256, 129)
    with pytest.raises(ValueError, match="129 codes cannot be packed"):
        relayout(q, Layout(packed=2))
    q = codes_of(SCHEMES["e4m3 channel"], 256, 128)
    with pytest.raises(ValueError, match="Wide codes are integers; this array holds E4M3"):
        relayout(q, Layout(wide=True))
