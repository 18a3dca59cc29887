"""What the quantized ragged product means. Every other backend is tested against this."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...qarray import dequantize, QArray
from ._call import RaggedCall


def refuses(call: RaggedCall) -> str | None:
    """It takes every call."""
    return None


def run(call: RaggedCall) -> Float[Array, "M N"]:
    """Multiplies the values that the codes stand for, and sums them, in float32."""
    lhs, rhs = (
        dequantize(x, jnp.float32) if isinstance(x, QArray) else x.astype(jnp.float32)
        for x in (call.lhs, call.rhs)
    )
    y = call.multiply(lhs, rhs, lax.Precision.HIGHEST, jnp.float32)
    return y.astype(call.out_dtype)
