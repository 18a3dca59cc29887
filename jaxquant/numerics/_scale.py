"""From a tile's values and its range rule to a scale and a zero point: pure and local.

Divisions by constants are products with reciprocals: XLA makes them that or not, depending on what
stands around them, and the bits must not depend on it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from ._cast import decode, encode
from .formats import Format
from .ranges import (
    AbsMax,
    AbsMean,
    Convention,
    ExponentRule,
    Fixed,
    MeanSquaredError,
    MinMax,
    Percentile,
    Range,
    RootMeanSquare,
    SharedExponent,
)

TINY = 2.0**-126
"""The least float32 that XLA does not flush to 0; `1 / TINY` is the largest such reciprocal."""


def peak(x: Float[Array, "..."], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """The largest magnitude along `axis`, which is kept with length 1; NaN where there is one.

    XLA's CPU compiler may hand a maximum of floats to a library that drops NaN, and a row with NaN
    would come out of a quantized product finite: hence the second look.
    """
    x = x.astype(jnp.float32)
    # Both ends as they are: for magnitudes the CPU compiler would write an array of them first.
    highest = jnp.maximum(x.max(axis=axis, keepdims=True), -x.min(axis=axis, keepdims=True))
    return jnp.where(any_nan(x, axis), jnp.nan, highest)


def any_nan(x: Float[Array, "..."], axis: int | tuple[int, ...]) -> Bool[Array, "..."]:
    """Whether there is NaN along `axis`, which is kept with length 1.

    In steps of up to 32, since XLA's CPU compiler writes the flags of longer ones before it
    gathers them.
    """
    axes = {a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))}
    flags = jnp.isnan(x)
    for a in sorted(axes):
        step = math.gcd(x.shape[a], 32)
        shape = (*flags.shape[:a], flags.shape[a] // step, step, *flags.shape[a + 1 :])
        flags = flags.reshape(shape).any(axis=a + 1)
    return flags.any(axis=tuple(axes), keepdims=True)


def symmetric_scale(
    x: Float[Array, "..."],
    axis: tuple[int, ...],
    rule: Range,
    format: Format,
    empty: float = 1.0,
) -> Float[Array, "..."]:
    """The scale of each tile, which lies along `axis` of `x`: `empty` for zeros, NaN for any NaN.

    Where no code stands for 0, a tile of zeros has the least scale there is.
    """
    match rule:
        case AbsMax(convention=convention):
            end = peak(x, axis)
            scale = _meeting(end, convention, format, x, axis)
        case Percentile(percent=percent, convention=convention):
            end = _with_nan(jnp.percentile(jnp.abs(x), percent, axis=axis, keepdims=True), x, axis)
            scale = _meeting(end, convention, format, x, axis)
        case RootMeanSquare(multiple=multiple, convention=convention):
            end = _of_unit(x, axis, lambda unit: jnp.sqrt(_mean(unit * unit, axis)))
            scale = _meeting(end * np.float32(multiple), convention, format, x, axis)
        case AbsMean(multiple=multiple):
            end = _of_unit(x, axis, lambda unit: _mean(jnp.abs(unit), axis))
            scale = _meeting(end * np.float32(multiple), Convention.HIGHEST, format, x, axis)
        case Fixed(low=low, high=high, convention=convention):
            end = jnp.where(peak(x, axis) >= 0, np.float32(max(-low, high)), jnp.nan)
            scale = _meeting(end, convention, format, x, axis)
        case SharedExponent(rule=exponent):
            end = peak(x, axis)
            scale = _power_of_two(end, exponent, format)
        case MeanSquaredError(base=AbsMax() as base):
            scale = symmetric_scale(x, axis, base, format, empty)
            return scale * _shrunk(x, axis, rule, scale, None, format)
        case _:
            raise ValueError(f"{rule} needs a zero point.")
    return jnp.where(end == 0, empty if format.has_zero else TINY, scale)


def asymmetric_scale(
    x: Float[Array, "..."],
    axis: tuple[int, ...],
    rule: Range,
    format: Format,
    empty: float = 1.0,
    *,
    real_zero: bool = False,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The gap between codes that cover a tile's range, and where that range begins.

    The gap is `empty` for tiles of zeros, and NaN where there is one. A search takes zero points to
    be codes, but for `real_zero`.
    """
    match rule:
        case MinMax(include_zero=include_zero):
            low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
            if include_zero:
                low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        case Percentile(percent=percent):
            ends = jnp.asarray([(100 - percent) / 2, (100 + percent) / 2], jnp.float32)
            low, high = jnp.percentile(x, ends, axis=axis, keepdims=True)
            low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        case Fixed(low=fixed_low, high=fixed_high):
            some = peak(x, axis)
            low, high = jnp.full_like(some, fixed_low), jnp.full_like(some, fixed_high)
        case MeanSquaredError(base=MinMax() as base):
            scale, low = asymmetric_scale(x, axis, base, format, empty)
            zero = zero_point(low, scale, format)
            zero = zero if real_zero else jnp.round(zero)
            factor = _shrunk(x, axis, rule, scale, zero, format, real_zero=real_zero)
            return scale * factor, low * factor
        case _:
            raise ValueError(f"{rule} takes no zero point.")
    scale = _over(high - low, format.highest - format.lowest)
    # A tile that is one number apart from 0 has no gap: its zero point and a gap of that size.
    scale = jnp.where(high == low, jnp.where(low == 0, empty, jnp.abs(low)), scale)
    return _with_nan(scale, x, axis), low


def zero_point(
    low: Float[Array, "..."], scale: Float[Array, "..."], format: Format
) -> Float[Array, "..."]:
    """The code, still as a real, that stands for 0 in a tile whose range starts at `low`."""
    return format.lowest - low / scale


def offset_by(product: Float[Array, "..."], term: Float[Array, "..."]) -> Float[Array, "..."]:
    """`product + term` in two roundings.

    A product and a sum may be fused to one operation, which rounds once and gives other bits. A
    barrier is gone by then, and a choice may be moved behind the sum; a maximum may not.
    """
    return jnp.maximum(product, np.finfo(np.float32).min) + term


def _meeting(
    end: Float[Array, "..."],
    convention: Convention,
    format: Format,
    x: Float[Array, "..."],
    axis: tuple[int, ...],
) -> Float[Array, "..."]:
    """The scale with which the code that the convention names stands for `end`."""
    match convention:
        case Convention.HIGHEST:
            return _over(end, format.highest)
        case Convention.MIDDLE:
            return _over(end, (format.highest - format.lowest) / 2)
        case Convention.LOWEST:
            return _over(end, -format.lowest)
        case Convention.SIGNED:
            low, high = (f(x, axis=axis, keepdims=True) for f in (jnp.min, jnp.max))
            signed = jnp.where(jnp.abs(low) >= jnp.abs(high), -end, end)
            return _over(signed, format.lowest)


def _power_of_two(
    end: Float[Array, "..."], rule: ExponentRule, format: Format
) -> Float[Array, "..."]:
    """`2 ** (exponent of end - largest exponent of the format)`, by the bits of both."""
    mantissa, exponent = math.frexp(format.highest)
    bits = lax.bitcast_convert_type(end.astype(jnp.float32), jnp.int32)
    if rule is ExponentRule.EVEN:
        # Integers have a step of 1. A carry goes into the exponent.
        kept = exponent - 1 if format.mantissa is None else format.mantissa
        bits = bits + (1 << (22 - kept))
    shared = (bits >> 23) - (exponent - 1)
    if rule is ExponentRule.CEIL:
        largest = int((2 * mantissa - 1) * 2**23)
        shared = shared + ((bits & (2**23 - 1)) > largest).astype(jnp.int32)
    scale = lax.bitcast_convert_type(jnp.clip(shared, 1, 253) << 23, jnp.float32)
    return jnp.where(jnp.isfinite(end), scale, end)


def _shrunk(
    x: Float[Array, "..."],
    axis: tuple[int, ...],
    rule: MeanSquaredError,
    scale: Float[Array, "..."],
    zero: Float[Array, "..."] | None,
    format: Format,
    *,
    real_zero: bool = False,
) -> Float[Array, "..."]:
    """For each tile the factor of the scale with which rounding errs least."""

    def loss(factor: Float[Array, ""]) -> Float[Array, "..."]:
        gap = scale * factor
        shifted = x * (1 / gap)
        if zero is None:
            rounded = decode(encode(shifted, format), format, jnp.float32)
        else:
            placed = offset_by(shifted, zero) if real_zero else jnp.round(shifted) + zero
            rounded = decode(encode(placed, format), format, jnp.float32) - zero
        # In units of the widest scale, so that the power of a tiny error is not flushed to 0.
        error = jnp.abs(rounded * factor - x * (1 / scale))
        return (error**rule.power).sum(axis=axis, keepdims=True)

    factors = 1 - jnp.arange(max(1, int(rule.shrink * rule.grid)), dtype=jnp.float32) / rule.grid

    def step(i: Any, best: tuple[Array, Array]) -> tuple[Array, Array]:
        least, kept = best
        now = loss(factors[i])
        return jnp.minimum(least, now), jnp.where(now < least, factors[i], kept)

    start = (loss(factors[0]), jnp.ones_like(scale))
    return lax.fori_loop(1, len(factors), step, start)[1]


def _of_unit(
    x: Float[Array, "..."],
    axis: tuple[int, ...],
    statistic: Callable[[Float[Array, "..."]], Float[Array, "..."]],
) -> Float[Array, "..."]:
    """A statistic that grows as `x` does, of `x` over its peak: no sum overflows or vanishes."""
    unit = jnp.clip(peak(x, axis), TINY, 1 / TINY)
    return unit * statistic(x * (1 / unit))


def _mean(x: Float[Array, "..."], axis: tuple[int, ...]) -> Float[Array, "..."]:
    count = float(math.prod(x.shape[a] for a in axis))
    return _over(x.sum(axis=axis, keepdims=True), count)


def _with_nan(
    value: Float[Array, "..."], x: Float[Array, "..."], axis: tuple[int, ...]
) -> Float[Array, "..."]:
    return jnp.where(any_nan(x, axis), jnp.nan, value)


def _over(x: Float[Array, "..."], divisor: float) -> Float[Array, "..."]:
    return x * jnp.asarray(1 / divisor, x.dtype)
