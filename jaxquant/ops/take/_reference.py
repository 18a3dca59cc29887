"""What a lookup in a QArray means: dequantize, then gather. Never optimized."""

from typing import Any

from jax import lax
from jaxtyping import Array, Float, Int

from ...qarray import dequantize, QArray


def gather(q: QArray, indices: Int[Array, "..."], **params: Any) -> Float[Array, "..."]:
    """`lax.gather` from the array that `q` stands for."""
    return lax.gather(dequantize(q), indices, **params)
