"""What the quantized convolution means. Every other backend is tested against this."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...qarray import dequantize, QArray
from ._call import ConvCall


def refuses(call: ConvCall) -> str | None:
    """It takes every call."""
    return None


def run(call: ConvCall) -> Float[Array, "..."]:
    """Convolves the values that the codes stand for, in float32."""
    lhs, rhs = (
        dequantize(x, jnp.float32) if isinstance(x, QArray) else x.astype(jnp.float32)
        for x in (call.lhs, call.rhs)
    )
    y = call.convolve(lhs, rhs, lax.Precision.HIGHEST, jnp.float32)
    return y.astype(call.out_dtype)
