"""The ragged product as XLA runs it: on codes, with scales after the sum.

Three forms, chosen by what the operands hold, never by what fails:
- *integer*: both sides hold integers. `int8 x int8 -> int32`, exact; scaled in float32, once a
  group where tiles are shorter than the contracted axis.
- *float*: both sides hold floats or tables; what they stand for is multiplied in bfloat16 where
  that holds it exactly, else in float32, and summed in float32.
- *weight-only*: one side is an ordinary array. Where one scale holds for all that an output
  sums, and the dtype of that array what codes stand for, these are multiplied and the result is
  scaled; else the weight is dequantized first.

Scales of an expert's outputs are looked up row by row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from ...qarray import dequantize, QArray, retile
from .._factors import (
    common_tile,
    factors,
    product_dtypes,
    refuses_codes,
    refuses_sum,
    scaled_after,
    scales,
)
from ._call import RaggedCall


def refuses(call: RaggedCall) -> str | None:
    """Why not, or `None`."""
    if not (isinstance(call.lhs, QArray) and isinstance(call.rhs, QArray)):
        return None
    reason = refuses_codes(call.lhs, call.rhs)
    if reason is None and call.lhs.scheme.values.integer:
        return refuses_sum(_tile(call))
    return reason


def run(call: RaggedCall) -> Float[Array, "M N"]:
    """The product, by the form that the operands' formats name."""
    if isinstance(call.lhs, QArray) and isinstance(call.rhs, QArray):
        y = _on_codes(call)
    else:
        y = _weight_only(call)
    return y.astype(call.out_dtype)


def _tile(call: RaggedCall) -> int:
    """The widest run of the contracted axis within which both scales are constant."""
    return common_tile(call.lhs.shape[1], call.lhs.tile[1], call.rhs.tile[1])


def _on_codes(call: RaggedCall) -> Float[Array, "M N"]:
    tile = _tile(call)
    lhs, rhs = retile(call.lhs, 1, tile), retile(call.rhs, 1, tile)
    dtype, sum_dtype = product_dtypes(lhs, rhs)
    rows, k = lhs.shape
    experts, _, n = rhs.shape
    # A short last tile is filled up with zeros, which add nothing to its sum.
    groups, short = -(-k // tile), (0, -k % tile)
    x = jnp.pad(factors(lhs, dtype), ((0, 0), short))
    w = jnp.pad(factors(rhs, dtype), ((0, 0), short, (0, 0)))
    if groups == 1:
        sums = call.multiply(x, w, call.precision, sum_dtype)[None]
    else:
        x = x.reshape(rows, groups, tile).swapaxes(0, 1)
        w = w.reshape(experts, groups, tile, n).swapaxes(0, 1)
        sums = _grouped(call, x, w, sum_dtype)
    expert = call.expert_of_row()
    y = sums.astype(jnp.float32) * scales(lhs, (1,)).T[:, :, None]
    # Past the end, a lookup takes the last expert's scales.
    y = (y * scales(rhs, (1,))[expert].swapaxes(0, 1)).sum(axis=0)
    # A row beyond the last group is 0 whatever its scale is, NaN included.
    return jnp.where((expert < experts)[:, None], y, 0.0)


def _grouped(
    call: RaggedCall,
    x: Shaped[Array, "groups M tile"],
    w: Shaped[Array, "groups E tile N"],
    sum_dtype: Any,
) -> Shaped[Array, "groups M N"]:
    def one(x: Any, w: Any, sizes: Any) -> Any:
        return lax.ragged_dot(
            x, w, sizes, precision=call.precision, preferred_element_type=sum_dtype
        )

    # A vmap of ragged_dot wants every operand batched.
    sizes = jnp.broadcast_to(call.group_sizes, (x.shape[0], *call.group_sizes.shape))
    return jax.vmap(one)(x, w, sizes)


def _weight_only(call: RaggedCall) -> Float[Array, "M N"]:
    """One side holds codes; the other sets the dtype that the product is computed in."""
    left = isinstance(call.lhs, QArray)
    q, plain = (call.lhs, call.rhs) if left else (call.rhs, call.lhs)
    whole = scaled_after(q, (1,), plain.dtype)
    values = factors(q, plain.dtype) if whole else dequantize(q, plain.dtype)
    sides = (values, plain) if left else (plain, values)
    y = call.multiply(*sides, call.precision, jnp.float32)
    if not whole:
        return y
    scale = scales(q, (1,))
    # Past the end, a lookup takes the last expert's scale; there the product is 0.
    return y * (scale if left else scale[call.expert_of_row(), 0])
