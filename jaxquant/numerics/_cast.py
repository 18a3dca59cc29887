"""Codes from reals and back: round to nearest, ties to even, never past the ends of a format."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from ._format import Format


def encode(x: Float[Array, "*dims"], format: Format) -> Shaped[Array, "*dims"]:
    """The codes of `format` nearest to `x`; ties go to even, values past an end to that end.

    NaN has no integer code and no place in a weight: callers check for it where data comes in
    (`jaxquant.quantize` names the leaf). Here NaN stays NaN in a float format and becomes 0 in an
    integer one.
    """
    x = jnp.clip(x.astype(jnp.float32), format.lowest, format.highest)
    if format.integer:
        # XLA leaves the conversion of NaN to an integer undefined.
        return jnp.where(jnp.isnan(x), 0.0, jnp.round(x)).astype(format.storage)
    # Casts to an 8-bit float overflow to NaN (e4m3) or infinity (e5m2): hence the clip above.
    return x.astype(format.storage)


def decode(codes: Shaped[Array, "*dims"], dtype: DTypeLike) -> Float[Array, "*dims"]:
    """The values that `codes` stand for, before any scale. Exact whenever `dtype` can hold them."""
    return codes.astype(dtype)
