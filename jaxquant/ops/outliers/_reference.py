"""What a product with outliers means. Every other backend is tested against this.

Elements that reach the threshold take no part in scales; the columns that hold one are 0 in what is
rounded, and are multiplied as they are (LLM.int8(), arXiv:2208.07339, eq. 8).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...qarray import dequantize
from .._activations import quantize_activation
from ._call import OutlierCall


def refuses(call: OutlierCall) -> str | None:
    """It takes every call."""
    return None


def run(call: OutlierCall) -> Float[Array, "..."]:
    """Multiplies what the codes stand for, and the columns kept apart, in float32."""
    x = call.x.astype(jnp.float32)
    big = call.big()
    apart = call.in_columns(big)
    q = quantize_activation(
        jnp.where(big, 0.0, x),
        call.activations,
        contracted=call.dot.contracted[call.side],
        stack=call.dot.batch[call.side],
    )
    w = dequantize(call.w, jnp.float32)
    below = jnp.where(apart, 0.0, dequantize(q, jnp.float32))
    y = _product(call, below, w)
    if call.columns is None:
        y = y + _product(call, jnp.where(apart, x, 0.0), w)
    else:
        known = call.known()
        y = y + _product(call, jnp.where(apart & jnp.logical_not(known), x, 0.0), w)
        rows = call.rows(jnp.where(apart & known, x, 0.0))
        index = jnp.broadcast_to(
            call.columns[..., None, :], (*rows.shape[:-1], call.columns.shape[-1])
        )
        chosen = jnp.take_along_axis(rows, index, axis=-1, mode="fill", fill_value=0)
        each = jnp.matmul(
            chosen, call.originals.astype(jnp.float32), precision=lax.Precision.HIGHEST
        )
        y = y + call.as_result(each)
    return y.astype(call.dot.out_dtype)


def _product(
    call: OutlierCall, x: Float[Array, "..."], w: Float[Array, "..."]
) -> Float[Array, "..."]:
    dot = call.with_sides(x, w)
    return lax.dot_general(
        dot.lhs,
        dot.rhs,
        dot.dimension_numbers,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
