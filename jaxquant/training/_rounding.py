"""Rounding with a derivative: codes of an array, and the array itself for gradients to reach."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..numerics import decode, encode
from ..qarray import QArray, Scheme, tile_shape
from ..qarray._qarray import scale_values, spread, tile_counts
from ..qarray._quantize import quantize_array, quantize_with, stored_zero_point, wanted_scale
from ._delayed import first_delayed, peaks_by_tile
from ._estimators import (
    Delayed,
    Estimator,
    gradient_scale,
    LSQ,
    LSQPlus,
    MovingAverage,
    PACT,
    Start,
    StraightThrough,
)

Learned = Mapping[str, Float[Array, "*tiles"]]
"""What an estimator learns, by name: one entry a tile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounding:
    """How an array is rounded in training: its scheme, the roles of its axes, the estimator.

    `features` is how many values of one example share a scale, which for weights is a whole tile.
    """

    scheme: Scheme
    contracted: tuple[int, ...]
    stack: tuple[int, ...] = ()
    estimator: Estimator = StraightThrough()
    features: int | None = None

    def tile(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tile_shape(shape, self.scheme.tile, contracted=self.contracted, stack=self.stack)


def codes_of(x: Float[Array, "..."], learned: Learned, rounding: Rounding) -> QArray:
    """The codes of `x`: by ranges of its own, or by what is learned. The same as in inference."""
    roles: dict[str, Any] = {"contracted": rounding.contracted, "stack": rounding.stack}
    if not learned:
        return quantize_array(x, rounding.scheme, **roles)
    scale, zero = held_scale(learned, rounding.scheme)
    return quantize_with(x, rounding.scheme, scale, zero, **roles)


def held_scale(learned: Learned, scheme: Scheme) -> tuple[Any, Any]:
    """The scales and the zero points, as they are stored, that learned quantities stand for."""
    if "low" in learned:
        return _of_range(learned["low"], learned["high"], scheme)
    alpha = learned.get("alpha")
    scale = learned["scale"] if alpha is None else alpha * (1 / scheme.values.highest)
    if scheme.zero_point is None or "zero_point" in learned:
        return scale, learned.get("zero_point")
    offset = learned.get("offset", jnp.zeros_like(scale))
    return scale, stored_zero_point(-offset / scale, scheme.zero_point)


def _of_range(low: Any, high: Any, scheme: Scheme) -> tuple[Any, Any]:
    """The scales and zero points of ranges from least to largest value; 0 is always within."""
    scale = _gap(low, high, scheme)
    if scheme.zero_point is None:
        return scale, None
    zero = scheme.values.lowest - jnp.minimum(low, 0.0) / scale
    return scale, stored_zero_point(zero, scheme.zero_point)


def _gap(low: Any, high: Any, scheme: Scheme) -> Any:
    """The scale of a range from least to largest value, which 0 is within."""
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    format = scheme.values
    if scheme.zero_point is None:
        return _positive(jnp.maximum(-low, high) * (1 / format.highest))
    return _positive((high - low) * (1 / (format.highest - format.lowest)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rounded(
    rounding: Rounding, x: Float[Array, "..."], learned: Learned
) -> tuple[Float[Array, "..."], QArray]:
    """`x` as it is, and its codes.

    What computes on the codes sends the gradient of what they stand for to the first of the two;
    from there it goes on to `x` and to `learned` as the estimator says.
    """
    return x, codes_of(x, learned, rounding)


def _forward(rounding: Rounding, x: Any, learned: Any) -> tuple[Any, Any]:
    q = codes_of(x, learned, rounding)
    match rounding.estimator:
        case StraightThrough(clipped=False) | Delayed():
            # Nothing is kept: of activations this saves an array.
            return (x, q), None
        case StraightThrough():
            return (x, q), (x, learned, scale_values(q), q.zero_point)
        case _:
            return (x, q), (x, learned, None, None)


def _backward(rounding: Rounding, kept: Any, cotangents: Any) -> tuple[Any, Any]:
    g, _ = cotangents
    if kept is None:
        return g, None
    x, learned, scale, zero = kept
    if learned:
        scale, zero = held_scale(learned, rounding.scheme)
    tile, format = rounding.tile(x.shape), rounding.scheme.values
    u = _in_gaps(x, scale, zero, tile)
    if isinstance(rounding.estimator, (StraightThrough, MovingAverage)):
        inside = (u >= format.lowest) & (u <= format.highest)
        return jnp.where(inside, g, 0), None
    (counts,) = {part.shape for part in learned.values()}
    total = functools.partial(_over_tiles, tile=tile, counts=counts)
    wide = g.astype(jnp.float32)
    if isinstance(rounding.estimator, PACT):
        past = x >= spread(learned["alpha"], tile, x.shape)
        passed = jnp.where((x >= 0) & ~past, g, 0)
        return passed, {"alpha": total(jnp.where(past, wide, 0.0))}
    inside = (u > format.lowest) & (u < format.highest)
    passed = jnp.where(inside, g, 0)
    # The offset is a number of its own, not a number of gaps: an end is `Q(u) s + offset`.
    nearest = decode(encode(u, format), format, jnp.float32)
    factor = gradient_scale(rounding.estimator, rounding.features or math.prod(tile), format)
    found = {"scale": factor * total(wide * jnp.where(inside, nearest - u, nearest))}
    if isinstance(rounding.estimator, LSQPlus):
        found["offset"] = factor * total(jnp.where(inside, 0.0, wide))
    return passed, found


def _in_gaps(x: Any, scale: Any, zero: Any, tile: tuple[int, ...]) -> Any:
    """`x / s + z` in float32: where `x` lies among the codes."""
    u = x.astype(jnp.float32) * spread(1.0 / scale, tile, x.shape)
    return u if zero is None else u + spread(zero.astype(jnp.float32), tile, x.shape)


def _over_tiles(x: Any, tile: tuple[int, ...], counts: tuple[int, ...]) -> Any:
    """Sums over tiles: the transpose of `spread`."""
    zeros = jnp.zeros(counts, jnp.float32)
    _, pull = jax.vjp(lambda part: spread(part, tile, x.shape), zeros)
    return pull(x)[0]


rounded.defvjp(_forward, _backward)


def first_range(
    estimator: Estimator, w: Float[Array, "..."], scheme: Scheme, tile: tuple[int, ...]
) -> dict[str, Float[Array, "*tiles"]]:
    """Where what is learned of a weight starts, a tile an entry.

    LSQ: `2 mean|w| / sqrt(Qp)` (section 2.1), or by the range rule of the scheme. LSQ+, which has
    offsets for ranges that are not centered: by the range rule. Delayed: as after a step.
    """
    wide = w.astype(jnp.float32)
    if isinstance(estimator, Delayed):
        peak = peaks_by_tile(wide, tile)
        return first_delayed(estimator, scheme.values, peak.shape, peak)
    if isinstance(estimator, LSQ) and estimator.start is Start.RANGE:
        # A range may meet its largest magnitude with the lowest code; learned scales are positive.
        return {"scale": jnp.abs(wanted_scale(wide, scheme, tile)[0])}
    if isinstance(estimator, LSQPlus):
        scale, low = wanted_scale(wide, scheme, tile)
        assert low is not None
        return {"scale": scale, "offset": low - scale * scheme.values.lowest}
    counts = tile_counts(w.shape, tile)
    size = _over_tiles(jnp.ones(w.shape, jnp.float32), tile, counts)
    mean = _over_tiles(jnp.abs(wide), tile, counts) / size
    return range_from(estimator, scheme, mean, mean, mean)


def range_from(
    estimator: Estimator, scheme: Scheme, mean: Any, low: Any, high: Any
) -> dict[str, Any]:
    """The same of activations, from what was seen of them."""
    format = scheme.values
    match estimator:
        case LSQPlus():
            scale = _gap(low, high, scheme)
            return {"scale": scale, "offset": jnp.minimum(low, 0.0) - scale * format.lowest}
        case PACT():
            return {"alpha": _positive(high)}
        case MovingAverage():
            return {"low": low, "high": high}
        case LSQ(start=Start.RANGE):
            return {"scale": _gap(low, high, scheme)}
    return {"scale": _positive(mean * (2 / math.sqrt(max(1.0, format.highest))))}


def _positive(x: Any) -> Any:
    return jnp.where(x <= 0, 1.0, x).astype(jnp.float32)  # NaN stays, and is told of.
