import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import normal, SCHEMES, uneven, values

from jaxquant.ops import einsum, Refusal
from jaxquant.qarray import Layout, quantize_array, relayout

SIZES = dict(b=3, m=5, k=64, h=4, n=8, d=16)
# subscripts, which operand is the weight, its contracted and its stack axes.
EQUATIONS = [
    ("bk,kn->bn", 1, "k", ""),
    ("bk,kn->nb", 1, "k", ""),
    ("kn,bmk->bmn", 0, "k", ""),
    ("kn,bmk->nbm", 0, "k", ""),
    ("bmhd,hdn->bmn", 1, "hd", ""),
    ("bmdh,hdn->bmn", 1, "hd", ""),
    ("bmk,hkd->bhmd", 1, "k", ""),
    ("hmk,hkn->hmn", 1, "k", "h"),
    ("mhk,hnk->mhn", 1, "k", "h"),
    ("hbmk,hkn->mbhn", 1, "k", "h"),
    ("bk,bk->b", 1, "k", "b"),
    ("k,k->", 1, "k", ""),
    ("b,n->bn", 1, "", ""),
    (" b k , k n -> b n ", 1, "k", ""),
    ("bmk,kn,nd->bmd", 1, "k", ""),
    ("bmk,kn,nd->bmd", 2, "n", ""),
    ("kn,bmk,nd->dmb", 0, "k", ""),
    ("bmk,bm,kn->bn", 2, "k", ""),
    ("bmk,kn,bm->bn", 1, "k", ""),
    ("hbk,hkn,b->hn", 1, "k", "h"),
    ("bk,kh,kn,hd->bnd", 2, "k", ""),
]


def _operands(subscripts: str) -> tuple[str, list]:
    letters = subscripts.replace(" ", "")
    shapes = [[SIZES[c] for c in part] for part in letters.partition("->")[0].split(",")]
    return letters, [uneven(*shape, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", ["int8 channel", "int4 channel"])
@pytest.mark.parametrize("subscripts, side, contracted, stack", EQUATIONS)
def test_it_is_the_einsum_of_what_the_codes_stand_for(subscripts, side, contracted, stack, name):
    letters, sides = _operands(subscripts)
    part = letters.partition("->")[0].split(",")[side]
    q = quantize_array(
        sides[side],
        SCHEMES[name],
        contracted=tuple(map(part.index, contracted)),
        stack=tuple(map(part.index, stack)),
    )
    exact = [np.asarray(x).astype(np.float64) for x in sides]
    exact[side] = values(q)
    expected = np.einsum(letters, *exact)
    # At most 64 and 16 roundings of sums, and some of scales, of the sum of magnitudes.
    allowed = 96 * 2.0**-24 * np.einsum(letters, *map(np.abs, exact))
    if name == "int4 channel" and len(part) > 1:
        q = relayout(q, Layout(order=tuple(range(-1, -len(part) - 1, -1))))
    sides[side] = q
    got = einsum(subscripts, *sides)
    assert got.shape == expected.shape
    assert (np.abs(np.asarray(got) - expected) <= allowed).all()


def test_both_operands_may_be_quantized_and_a_backend_named():
    x = quantize_array(normal(3, 64), SCHEMES["int8 channel"])
    w = quantize_array(normal(64, 8), SCHEMES["int8 channel"], contracted=(0,))
    expected = np.einsum("bk,kn->nb", values(x), values(w))
    for backend in ("xla", "reference"):
        got = einsum("bk,kn->nb", x, w, backend=backend)
        np.testing.assert_allclose(got, expected, rtol=0, atol=64 * 2.0**-20)
    with pytest.raises(ValueError, match="no backend named 'fast'"):
        einsum("bk,kn->bn", x, w, backend="fast")
    other = quantize_array(normal(3, 64), SCHEMES["e4m3 channel"])
    with pytest.raises(Refusal, match="not E4M3 with INT8"):
        einsum("bk,kn->bn", other, w, backend="xla")


def test_operands_are_contracted_from_left_to_right():
    """... so that the order in which they are written is the order of the work."""
    w = quantize_array(normal(64, 8), SCHEMES["int8 channel"], contracted=(0,))
    v = quantize_array(normal(8, 16), SCHEMES["int4 channel"], contracted=(0,))
    x = normal(3, 64)

    def shapes(subscripts, *operands):
        run = jax.make_jaxpr(lambda *args: einsum(subscripts, *args, backend="xla"))
        return re.findall(r"\w+(\[[\d,]*\]) = dot_general", str(run(*operands)))

    assert shapes("bk,kn,nd->bd", x, w, v) == ["[3,8]", "[3,16]"]
    assert shapes("nd,bk,kn->bd", v, x, w) == ["[8,16,3,64]", "[16,3]"]
    got = einsum("bk,kn,nd->bd", x, w, v)
    expected = np.asarray(x, np.float64) @ values(w) @ values(v)
    magnitude = np.abs(x) @ np.abs(values(w)) @ np.abs(values(v))
    assert (np.abs(got - expected) <= 90 * 2.0**-24 * magnitude).all()


def test_a_pair_of_plain_operands_is_a_plain_product():
    x, m = normal(3, 5, 64), normal(3, 5)
    q = quantize_array(normal(64, 8), SCHEMES["int8 channel"], contracted=(0,))
    exact = [np.asarray(x, np.float64), np.asarray(m, np.float64), values(q)]
    expected = np.einsum("bmk,bm,kn->bn", *exact)
    # 5 roundings of the first sums, 64 of the second, and a few of scales.
    allowed = 80 * 2.0**-24 * np.einsum("bmk,bm,kn->bn", *map(np.abs, exact))
    assert (np.abs(einsum("bmk,bm,kn->bn", x, m, q) - expected) <= allowed).all()


REFUSED = [
    ("bk,kn", "two operands or more and an explicit result, such as 'bk,kn->bn'; got 'bk,kn'"),
    ("bk->b", "two operands or more"),
    ("bk,kn,nm->bm", "names 3 operands; 2 were given"),
    ("...k,kn->...n", "two operands or more and an explicit result"),
    ("b1,1n->bn", "two operands or more"),
    ("bkm,kn->bmn", "names 3 axes of operand 0, which has 2"),
    ("bk,k->b", "names 1 axes of operand 1, which has 2"),
    ("bb,bn->bn", "names an axis twice in 'bb'; take a diagonal first"),
    ("bk,kn->bnn", "names an axis twice in 'bnn'"),
    ("bk,kn->n", r"\['b'\] stand in one place only. Sum those axes before"),
    ("bk,kn->bm", r"\['m', 'n'\] stand in one place only"),
    ("kb,kn->bn", "'k' is 32 long in one operand and 64 in another. Axes of length 1"),
]


@pytest.mark.parametrize("subscripts, message", REFUSED)
def test_other_subscripts_are_refused_with_a_way_out(subscripts: str, message: str):
    q = quantize_array(jnp.ones((64, 64)), SCHEMES["int8 channel"], contracted=(0,))
    with pytest.raises(ValueError, match=message):
        einsum(subscripts, jnp.ones((32, 64)), q)
