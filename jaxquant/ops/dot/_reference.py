"""What the quantized dot means. Every other backend is tested against this; never optimized."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...qarray import dequantize, QArray
from ._call import DotCall


def refuses(call: DotCall) -> str | None:
    """It takes every call."""
    return None


def run(call: DotCall) -> Float[Array, "..."]:
    """Multiplies the values that the codes stand for, and sums them, in float32."""
    lhs, rhs = (
        dequantize(x, jnp.float32) if isinstance(x, QArray) else x.astype(jnp.float32)
        for x in (call.lhs, call.rhs)
    )
    y = lax.dot_general(
        lhs,
        rhs,
        call.dimension_numbers,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return y.astype(call.out_dtype)
