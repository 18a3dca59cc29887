"""The dot as XLA runs it best anywhere: integer and fp8 products with scales after the sum.

Three forms, chosen by what the operands hold, never by what fails:
- *integer*: both sides hold integers. `int8 x int8 -> int32`, exact; scaled in float32.
- *float*: both sides hold floats or tables. Of 8-bit floats `fp8 x fp8 -> float32`, else what they
  stand for, in the narrowest dtype that holds it exactly; scaled in float32. With narrow tiles both
  are dequantized first: in bfloat16 where their scales are powers of two, which it holds exactly.
- *weight-only*: one side is an ordinary array. With wide tiles the codes are multiplied as they
  are and each group's sum is scaled; with narrow tiles, or where the dtype of the other side does
  not hold what codes stand for, the weight is dequantized first.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...numerics import BFLOAT16
from ...qarray import dequantize, QArray, Scheme
from .._factors import exact_codes, product_dtypes, refuses_centered, refuses_codes, refuses_sum
from ._call import DotCall
from ._split import contracted_tiles, narrow, scaled_sums


def refuses(call: DotCall) -> str | None:
    """Why not, or `None`."""
    operands = [x for x in (call.lhs, call.rhs) if isinstance(x, QArray)]
    if len(operands) < 2:
        return refuses_centered(*operands)
    reason = refuses_codes(call.lhs, call.rhs)
    if reason is None and call.lhs.scheme.values.integer:
        return refuses_sum(math.prod(contracted_tiles(call)))
    return reason


def run(call: DotCall) -> Float[Array, "..."]:
    """The product, by the form that the operands' formats name."""
    left, right = isinstance(call.lhs, QArray), isinstance(call.rhs, QArray)
    if left and right:
        if call.lhs.scheme.values.integer:
            return scaled_sums(call, (jnp.int8, jnp.int8), jnp.int32)
        if narrow(call):
            return dequantized(call, exact_dtype(call.lhs, call.rhs))
        return scaled_sums(call, float_dtypes(call), jnp.float32)
    return weight_only(call)


def exact_dtype(*operands: QArray) -> Any:
    """The narrowest dtype that holds all values of operands that hold no integers."""
    for q in operands:
        scale = q.scheme.scale
        if isinstance(scale, Scheme) or not scale.power_of_two:
            return jnp.float32
        if not q.scheme.values.exact_in(BFLOAT16.storage):
            return jnp.float32
    return jnp.bfloat16


def float_dtypes(call: DotCall) -> tuple[Any, Any]:
    """In which dtypes two sides that hold no integers are multiplied, exactly."""
    formats = [call.lhs.scheme.values, call.rhs.scheme.values]
    if all(f.native and f.bits == 8 for f in formats):
        return formats[0].storage, formats[1].storage
    dtype, _ = product_dtypes(call.lhs, call.rhs)
    return dtype, dtype


def weight_only(call: DotCall) -> Float[Array, "..."]:
    """One side holds codes; the other sets the dtype that the product is computed in."""
    plain = call.rhs if isinstance(call.lhs, QArray) else call.lhs
    quantized = call.lhs if isinstance(call.lhs, QArray) else call.rhs
    if not narrow(call) and exact_codes(quantized, plain.dtype):
        return scaled_sums(call, (plain.dtype, plain.dtype), jnp.float32)
    return dequantized(call, plain.dtype)


def dequantized(call: DotCall, dtype: Any) -> Float[Array, "..."]:
    """Dequantizes first, into `dtype`, and multiplies as the float model would."""
    lhs, rhs = (dequantize(x, dtype) if isinstance(x, QArray) else x for x in (call.lhs, call.rhs))
    y = lax.dot_general(
        lhs,
        rhs,
        call.dimension_numbers,
        precision=call.precision,
        preferred_element_type=jnp.float32,
    )
    return y.astype(call.out_dtype)
