"""How a tile picks its scale from its own values: pure and local. Rules are values."""

import dataclasses
import enum

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._format import Format


class Convention(enum.Enum):
    """Which number of a signed integer format meets the largest magnitude of a tile.

    Four conventions are in use for "symmetric int4", and they give different bytes; the numbers
    below are for 4 bits. `algorithms` that must match another library name theirs.
    """

    HIGHEST = "highest"
    """peak / 7: nothing is ever clipped (AutoAWQ, SmoothQuant, ggml Q8_0)."""
    MIDDLE = "middle"
    """peak / 7.5: the largest value is clipped by at most half a gap (GPTQ, compressed-tensors)."""
    LOWEST = "lowest"
    """peak / 8: one more code in use; the largest positive value may be clipped by a whole gap."""
    SIGNED = "signed"
    """signed peak / -8: the largest magnitude is always met, the scale may be negative (Q4_0)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsMax:
    """The scale that lets the tile's largest magnitude meet the end of the format."""

    convention: Convention = Convention.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinMax:
    """Lowest and highest code meet the tile's smallest and largest value; needs a zero point.

    The range always includes 0, so that 0 is exactly representable.
    """


Range = AbsMax | MinMax


def peak(x: Float[Array, "..."], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """The largest magnitude along `axis`, which is kept with length 1; NaN where there is one.

    XLA's CPU compiler may hand a maximum of floats to a library that drops NaN, and a row with NaN
    would come out of a quantized product finite: hence the second look.
    """
    highest = jnp.abs(x.astype(jnp.float32)).max(axis=axis, keepdims=True)
    return jnp.where(jnp.isnan(x).any(axis=axis, keepdims=True), jnp.nan, highest)


def symmetric_scale(
    x: Float[Array, "..."], axis: tuple[int, ...], rule: AbsMax, format: Format
) -> Float[Array, "..."]:
    """The scale of each tile, which lies along `axis` of `x`: 1 for zeros, NaN for any NaN."""
    highest = peak(x, axis)
    match rule.convention:
        case Convention.HIGHEST:
            scale = _over(highest, format.highest)
        case Convention.MIDDLE:
            scale = _over(highest, (format.highest - format.lowest) / 2)
        case Convention.LOWEST:
            scale = _over(highest, -format.lowest)
        case Convention.SIGNED:
            low, high = (f(x, axis=axis, keepdims=True) for f in (jnp.min, jnp.max))
            signed = jnp.where(jnp.abs(low) >= jnp.abs(high), -highest, highest)
            scale = _over(signed, format.lowest)
    return jnp.where(highest == 0, 1.0, scale)


def asymmetric_scale(
    x: Float[Array, "..."], axis: tuple[int, ...], format: Format
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The gap between codes that cover a tile and 0, and the least value of the tile and 0.

    The gap is 1 for tiles of zeros, and NaN where there is one.
    """
    low = jnp.minimum(x.min(axis=axis, keepdims=True), 0)
    high = jnp.maximum(x.max(axis=axis, keepdims=True), 0)
    scale = _over(high - low, format.highest - format.lowest)
    scale = jnp.where(high == low, 1.0, scale)
    return jnp.where(jnp.isnan(peak(x, axis)), jnp.nan, scale), low


def _over(x: Float[Array, "..."], divisor: float) -> Float[Array, "..."]:
    """`x / divisor` as a product: XLA makes it one or not, depending on what stands around it."""
    return x * jnp.asarray(1 / divisor, x.dtype)


def zero_point(
    low: Float[Array, "..."], scale: Float[Array, "..."], format: Format
) -> Float[Array, "..."]:
    """The code, still as a real, that stands for 0 in a tile whose range starts at `low`."""
    return format.lowest - low / scale
