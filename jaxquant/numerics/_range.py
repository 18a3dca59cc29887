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


def symmetric_scale(
    low: Float[Array, "*tiles"], high: Float[Array, "*tiles"], rule: AbsMax, format: Format
) -> Float[Array, "*tiles"]:
    """The scale of each tile whose values span `[low, high]`; 1 for tiles of zeros."""
    peak = jnp.maximum(jnp.abs(low), jnp.abs(high))
    match rule.convention:
        case Convention.HIGHEST:
            scale = peak / jnp.asarray(format.highest, peak.dtype)
        case Convention.MIDDLE:
            scale = peak / jnp.asarray((format.highest - format.lowest) / 2, peak.dtype)
        case Convention.LOWEST:
            scale = peak / jnp.asarray(-format.lowest, peak.dtype)
        case Convention.SIGNED:
            signed = jnp.where(jnp.abs(low) >= jnp.abs(high), low, high)
            scale = signed / jnp.asarray(format.lowest, peak.dtype)
    return jnp.where(peak == 0, 1.0, scale)


def asymmetric_scale(
    low: Float[Array, "*tiles"], high: Float[Array, "*tiles"], format: Format
) -> Float[Array, "*tiles"]:
    """The gap between neighbouring codes that cover `[low, high]` and 0; 1 for tiles of zeros."""
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    scale = (high - low) / jnp.asarray(format.highest - format.lowest, low.dtype)
    return jnp.where(high == low, 1.0, scale)


def zero_point(
    low: Float[Array, "*tiles"], scale: Float[Array, "*tiles"], format: Format
) -> Float[Array, "*tiles"]:
    """The code, still as a real, that stands for 0 in a tile that starts at `min(low, 0)`."""
    return format.lowest - jnp.minimum(low, 0) / scale
