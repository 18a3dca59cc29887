"""Which form is compiled, and what is refused; what is computed: tests/laws/test_ragged_dots.py"""

import re

import jax
import jax.numpy as jnp
import pytest
from quantized import normal, SCHEMES

from jaxquant.ops import ragged_dot, Refusal
from jaxquant.ops.ragged_dot._api import make_call
from jaxquant.ops.ragged_dot._xla import refuses
from jaxquant.qarray import PER_CHANNEL, quantize_array, Scheme, schemes

SIZES = jnp.asarray([4, 0, 8], jnp.int32)


def _rows(name: str | None = None, dtype=jnp.float32):
    x = normal(16, 64, dtype=dtype)
    return x if name is None else quantize_array(x, SCHEMES[name])


def _experts(scheme: str | Scheme, dtype=jnp.float32):
    scheme = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    return quantize_array(normal(3, 64, 8, dtype=dtype), scheme, contracted=(1,), stack=(0,))


def _traced(x, w) -> str:
    return str(jax.make_jaxpr(lambda x, w: ragged_dot(x, w, SIZES, backend="xla"))(x, w))


def _sums(text: str) -> list[str]:
    return re.findall(r"(\w+\[[\d,]*\]) = ragged_dot_general", text)


def test_integers_are_multiplied_as_integers_once_a_group():
    assert _sums(_traced(_rows("int8 channel"), _experts("int4 channel"))) == ["i32[16,8]"]
    assert _sums(_traced(_rows("int8 channel"), _experts("int4 g32 bfloat16"))) == ["i32[2,16,8]"]


def test_floats_are_multiplied_in_bfloat16_where_it_holds_them():
    text = _traced(_rows("e4m3 channel"), _experts("e5m2 tensor"))
    assert _sums(text) == ["f32[16,8]"] and "bf16[3,64,8]" in text
    table = Scheme(values=schemes.NF4.values, tile=PER_CHANNEL)
    assert "bf16[3,64,8]" not in _traced(_rows("e4m3 channel"), _experts(table))


def test_a_scale_an_output_is_applied_after_the_sum():
    text = _traced(_rows(), _experts("int8 channel"))
    assert _sums(text) == ["f32[16,8]"] and not re.search(r"\[3,64,8\] = mul", text)
    assert re.search(r"\[3,64,8\] = mul", _traced(_rows(), _experts("int4 g32 bfloat16")))


def test_a_model_in_bfloat16_multiplies_bfloat16_and_sums_in_float32():
    text = _traced(_rows(dtype=jnp.bfloat16), _experts("int8 channel", jnp.bfloat16))
    assert _sums(text) == ["f32[16,8]"]
    assert "bf16[3,64,8]" in text and "f32[3,64,8]" not in text


REFUSED = [
    ("int8 channel", "e4m3 channel", "integers with integers .*, not INT8 with E4M3"),
    ("int8 channel", "int8 zero channel", "INT8 less its zero point does not fit int8"),
]


@pytest.mark.parametrize("rows, experts, message", REFUSED)
def test_what_it_cannot_multiply_is_refused(rows: str, experts: str, message: str):
    with pytest.raises(Refusal, match=message):
        _traced(_rows(rows), _experts(experts))


def test_sums_that_int32_cannot_hold_are_refused():
    def call(k: int, name: str):
        x, w = (
            jax.eval_shape(
                lambda x, a=axis: quantize_array(x, SCHEMES[name], contracted=(a,)),
                jax.ShapeDtypeStruct(shape, jnp.float32),
            )
            for axis, shape in ((1, (1, k)), (1, (1, k, 1)))
        )
        return make_call(x, w, jnp.ones((1,), jnp.int32))

    assert refuses(call(131_071, "int8 channel")) is None
    reason = refuses(call(131_072, "int8 channel"))
    assert "int32 holds sums of 131071 products, not of 131072" in reason
    # Each group has its own sum.
    assert refuses(call(2**20, "int8 g128 bfloat16")) is None
    assert refuses(call(2**20, "e4m3 channel")) is None
