"""The convolution as XLA runs it best anywhere: on codes, with scales after the sum.

Three forms, chosen by what the operands hold, never by what fails:
- *integer*: both sides hold integers. `int8 x int8 -> int32`, exact; scaled in float32. Zero points
  are taken off before, so that padding with zeros is padding with the value 0.
- *float*: both sides hold floats or tables; what they stand for is multiplied in bfloat16 where
  that holds it exactly, else in float32, and summed in float32.
- *weight-only*: one side is an ordinary array. Where one scale holds for all that an output
  sums, and the dtype of that array what codes stand for, these are convolved and the result is
  scaled; else the weight is dequantized first.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ...qarray import dequantize, QArray
from .._factors import (
    factors,
    product_dtypes,
    refuses_codes,
    refuses_sum,
    scaled_after,
    scales,
)
from ._call import ConvCall


def refuses(call: ConvCall) -> str | None:
    """Why not, or `None`."""
    if not (isinstance(call.lhs, QArray) and isinstance(call.rhs, QArray)):
        return None
    reason = refuses_codes(call.lhs, call.rhs)
    if reason is not None:
        return reason
    for side, q in enumerate((call.lhs, call.rhs)):
        if not scaled_after(q, call.summed(side)):
            return (
                f"tiles of {q.tile} give several scales to what one output sums "
                f"(axes {call.summed(side)}), and a convolution of codes sums it at once"
            )
    return refuses_sum(call.products) if call.lhs.scheme.values.integer else None


def run(call: ConvCall) -> Float[Array, "..."]:
    """The convolution, by the form that the operands' formats name."""
    sides = (call.lhs, call.rhs)
    plain = [x for x in sides if not isinstance(x, QArray)]
    if plain:
        dtype, sum_dtype = plain[0].dtype, jnp.float32
    else:
        dtype, sum_dtype = product_dtypes(call.lhs, call.rhs)
    values, after = [], []
    for side, x in enumerate(sides):
        if not isinstance(x, QArray):
            values.append(x)
        elif not plain or scaled_after(x, call.summed(side), dtype):
            values.append(factors(x, dtype))
            after.append(_scale(call, side))
        else:
            values.append(dequantize(x, dtype))
    y = call.convolve(values[0], values[1], call.precision, sum_dtype).astype(jnp.float32)
    for scale in after:
        y = y * scale
    return y.astype(call.out_dtype)


def _scale(call: ConvCall, side: int) -> Float[Array, "..."]:
    """The scales of one side, shaped to multiply the result."""
    q = (call.lhs, call.rhs)[side]
    scale = scales(q, call.summed(side)).reshape(-1)
    batch, features = call.dimension_numbers.out_spec[:2]
    if side == 1:
        table = scale[None, :]
    else:
        # Output features come in as many runs as there are batch groups, one for each group.
        groups = call.settings["batch_group_count"]
        outputs = call.rhs.shape[call.dimension_numbers.rhs_spec[0]]
        table = scale.reshape(groups, -1).T
        table = jnp.repeat(table, outputs // groups, axis=1) if groups > 1 else table
    shape = [1] * len(call.dimension_numbers.out_spec)
    shape[batch], shape[features] = table.shape
    return (table if batch < features else table.T).reshape(shape)
