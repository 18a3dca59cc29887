"""Which form is compiled, and what is refused; what is computed: tests/laws/test_convolutions.py"""

import re

import jax
import jax.numpy as jnp
import pytest
from quantized import normal, SCHEMES

from jaxquant.ops import conv_general_dilated, Refusal
from jaxquant.ops.conv._api import make_call
from jaxquant.ops.conv._xla import refuses
from jaxquant.qarray import PER_CHANNEL, quantize_array, Scheme, schemes

NUMBERS = ("NHWC", "HWIO", "NHWC")


def _images(name: str | None = None, dtype=jnp.float32):
    x = normal(2, 5, 5, 64, dtype=dtype)
    return x if name is None else quantize_array(x, SCHEMES[name], contracted=(1, 2, 3))


def _kernel(scheme: str | Scheme, dtype=jnp.float32):
    scheme = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    return quantize_array(normal(3, 3, 64, 8, dtype=dtype), scheme, contracted=(0, 1, 2))


def _traced(x, w, **keywords) -> str:
    def run(x, w):
        return conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=NUMBERS, backend="xla", **keywords
        )

    return str(jax.make_jaxpr(run)(x, w))


def _sums(text: str) -> list[str]:
    return re.findall(r"(\w+)\[[\d,]*\] = conv_general_dilated", text)


def test_integers_are_multiplied_as_integers():
    assert _sums(_traced(_images("int8 channel"), _kernel("int4 channel"))) == ["i32"]


def test_floats_are_multiplied_in_bfloat16_where_it_holds_them():
    text = _traced(_images("e4m3 channel"), _kernel("e5m2 tensor"))
    assert _sums(text) == ["f32"] and "bf16[3,3,64,8]" in text
    table = Scheme(values=schemes.NF4.values, tile=PER_CHANNEL)
    assert "bf16[3,3,64,8]" not in _traced(_images("e4m3 channel"), _kernel(table))


def test_a_scale_an_output_is_applied_after_the_sum():
    text = _traced(_images(), _kernel("int8 channel"))
    assert _sums(text) == ["f32"] and not re.search(r"\[3,3,64,8\] = mul", text)
    assert re.search(r"\[3,3,64,8\] = mul", _traced(_images(), _kernel("int4 zero g64")))


def test_a_model_in_bfloat16_multiplies_bfloat16_and_sums_in_float32():
    text = _traced(_images(dtype=jnp.bfloat16), _kernel("int8 channel", jnp.bfloat16))
    assert _sums(text) == ["f32"]
    assert "bf16[3,3,64,8]" in text and "f32[3,3,64,8]" not in text


def test_a_table_that_bfloat16_does_not_hold_is_dequantized():
    table = Scheme(values=schemes.NF4.values, tile=PER_CHANNEL)
    x = _images(dtype=jnp.bfloat16)
    assert re.search(r"\[3,3,64,8\] = mul", _traced(x, _kernel(table, jnp.bfloat16)))
    assert not re.search(r"\[3,3,64,8\] = mul", _traced(_images(), _kernel(table)))


REFUSED = [
    ("int8 channel", "e4m3 channel", "integers with integers .*, not INT8 with E4M3"),
    ("int8 channel", "int8 zero channel", "INT8 less its zero point does not fit int8"),
    ("int8 channel", "int4 zero g64", r"tiles of \(1, 1, 64, 1\) give several scales"),
    ("int8 middle g32", "int8 channel", r"tiles of \(1, 1, 1, 32\) give several scales"),
]


@pytest.mark.parametrize("images, kernel, message", REFUSED)
def test_what_it_cannot_multiply_is_refused(images: str, kernel: str, message: str):
    with pytest.raises(Refusal, match=message):
        _traced(_images(images), _kernel(kernel))


def test_sums_that_int32_cannot_hold_are_refused():
    def call(n: int, groups: int):
        shapes = (1, 1, n * groups), (1, n, groups)
        contracted = (1, 2), (0, 1)
        sides = (
            jax.eval_shape(
                lambda x, c=c: quantize_array(x, SCHEMES["int8 channel"], contracted=c),
                jax.ShapeDtypeStruct(shape, jnp.float32),
            )
            for shape, c in zip(shapes, contracted, strict=True)
        )
        settings = dict(window_strides=(1,), padding="VALID", feature_group_count=groups)
        return make_call(*sides, ("NWC", "WIO", "NWC"), settings)

    assert refuses(call(131_071, 1)) is None
    assert "int32 holds sums of 131071 products, not of 131072" in refuses(call(131_072, 1))
    # Each group has its own sum.
    assert refuses(call(131_071, 2)) is None
