"""Which form is compiled, and what is refused; what it computes is in tests/laws/test_dots.py."""

import re

import jax
import jax.numpy as jnp
import pytest
from quantized import normal, SCHEMES

from jaxquant.ops import dot, Refusal
from jaxquant.ops.dot._api import make_call
from jaxquant.ops.dot._xla import refuses
from jaxquant.qarray import quantize_array

ROWS = (((1,), (0,)), ((), ()))


def _weight(name: str, rows: int = 512, dtype: jnp.dtype = jnp.float32):
    return quantize_array(normal(rows, 64, dtype=dtype), SCHEMES[name], contracted=(0,))


def _traced(x, w) -> str:
    return str(jax.make_jaxpr(lambda x, w: dot(x, w, backend="xla"))(x, w))


def _dots(text: str) -> list[str]:
    """The type of every product's result."""
    return re.findall(r"(\w+\[[\d,]*\]) = dot_general", text)


def test_integers_are_multiplied_as_integers():
    x = quantize_array(normal(16, 512), SCHEMES["int8 channel"])
    assert _dots(_traced(x, _weight("int8 channel"))) == ["i32[16,64]"]
    assert _dots(_traced(x, _weight("int4 g32 bfloat16"))) == ["i32[16,16,64]"]


def test_8_bit_floats_are_multiplied_as_they_are():
    x = quantize_array(normal(16, 512), SCHEMES["e4m3 channel"])
    text = _traced(x, _weight("e4m3 channel"))
    assert _dots(text) == ["f32[16,64]"]
    assert "f32[512,64]" not in text


def test_scales_of_wide_tiles_are_applied_after_the_sum():
    for name, shape in [("int8 channel", "16,64"), ("int8 g128 bfloat16", "4,16,64")]:
        text = _traced(normal(16, 512), _weight(name))
        assert _dots(text) == [f"f32[{shape}]"]
        assert not re.search(r"f32\[[\d,]*(512,64|128,64)\] = mul", text)


def test_narrow_tiles_are_dequantized_first():
    """... since their partial sums would be as large as the weight."""
    text = _traced(normal(16, 512), _weight("int4 g32 bfloat16"))
    assert _dots(text) == ["f32[16,64]"]


def test_a_model_in_bfloat16_multiplies_bfloat16_and_sums_in_float32():
    w = _weight("int8 channel", dtype=jnp.bfloat16)
    text = _traced(normal(16, 512, dtype=jnp.bfloat16), w)
    assert _dots(text) == ["f32[16,64]"]
    assert "bf16[16,64]" in text and "f32[512,64]" not in text


REFUSED = [
    ("int8 channel", "e4m3 channel", "integers with integers .*, not INT8 with E4M3"),
    ("e4m3 channel", "int4 channel", "floats with floats, not E4M3 with INT4"),
    ("int8 channel", "int8 zero channel", "INT8 less its zero point does not fit int8"),
    ("int8 zero channel", "int8 channel", "INT8 less its zero point does not fit int8"),
    ("int8 channel", "int4 wide zero g32 bfloat16", "INT4 less its zero point .* fit int8"),
]


@pytest.mark.parametrize("activations, weight, message", REFUSED)
def test_what_it_cannot_multiply_is_refused(activations: str, weight: str, message: str):
    x = quantize_array(normal(16, 512), SCHEMES[activations])
    with pytest.raises(Refusal, match=message):
        dot(x, _weight(weight), backend="xla")


def test_sums_that_int32_cannot_hold_are_refused():
    def call(k: int, name: str):
        x, w = (
            jax.eval_shape(lambda x, a=axis: quantize_array(x, SCHEMES[name], contracted=(a,)), x)
            for axis, x in (
                (1, jax.ShapeDtypeStruct((1, k), jnp.float32)),
                (0, jax.ShapeDtypeStruct((k, 1), jnp.float32)),
            )
        )
        return make_call(x, w, ROWS)

    assert refuses(call(131_071, "int8 channel")) is None
    assert "int32 holds sums of 131071 products, not of 131072" in refuses(
        call(131_072, "int8 channel")
    )
    # Each group has its own sum.
    assert refuses(call(2**20, "int8 g128 bfloat16")) is None
    assert refuses(call(2**20, "e4m3 channel")) is None


@pytest.mark.parametrize("name", ["int8 zero channel", "int4 wide zero g32 bfloat16"])
def test_any_zero_point_is_taken_beside_plain_activations(name: str):
    assert refuses(make_call(normal(16, 512), _weight(name), ROWS)) is None
