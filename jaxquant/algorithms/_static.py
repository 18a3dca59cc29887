"""Scales of activations that are fixed before a call, from statistics of a site's inputs.

What range rules say of a tile's values they say here of all that was seen: of least and largest
values exactly, of percentiles and errors as exactly as a histogram knows values.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..intercept._histogram import Histogram
from ..intercept._observers import Extremes
from ..numerics import (
    AbsMax,
    Convention,
    decode,
    encode,
    Fixed,
    Format,
    MeanSquaredError,
    MinMax,
    Percentile,
    Range,
    SharedExponent,
)
from ..numerics._scale import asymmetric_scale, offset_by, symmetric_scale, zero_point
from ..qarray import Scheme
from ..qarray._quantize import stored_scale, stored_zero_point


def static_observers(scheme: Scheme) -> tuple[Any, ...]:
    """What has to be known of a site's inputs for `static_scale`.

    **Raises:** `ValueError` for range rules, or tiles, for which there is no observer.
    """
    rule = scheme.range
    if scheme.tile.kept is not None or isinstance(scheme.scale, Scheme) or scheme.centered:
        raise ValueError(
            f"{scheme} has scales for each token, or holds them as codes: they cannot be fixed "
            "before a call. Use Tile(contracted=..., kept=None) and a scale format."
        )
    if isinstance(rule, Fixed):
        return ()
    if isinstance(rule, (AbsMax, MinMax, SharedExponent)):
        return (Extremes(),)
    if not isinstance(rule, (Percentile, MeanSquaredError)):
        raise ValueError(
            f"No observer keeps what the range {rule} is made of. Use AbsMax, MinMax, Percentile, "
            "MeanSquaredError, SharedExponent or Fixed."
        )
    if scheme.tile.contracted is not None:
        raise ValueError(
            f"Histograms are of all channels together, and {scheme} has tiles of "
            f"{scheme.tile.contracted}. Use PER_TENSOR with {type(rule).__name__}, or AbsMax."
        )
    if isinstance(rule, MeanSquaredError) and _convention(rule) is Convention.SIGNED:
        raise ValueError(
            f"{rule} shrinks a range that ends at a signed peak, which a histogram of both sides "
            "does not do. Use another convention."
        )
    return (Extremes(), Histogram())


def static_scale(
    scheme: Scheme,
    statistics: Mapping[str, Any],
    *,
    stack: tuple[int, ...],
    k: int,
    histogram: Histogram | None = None,
) -> dict[str, Array]:
    """`scale` `[*stack, tiles]`, and `zero_point` if the scheme has them: state of a site.

    `statistics` are those of `static_observers(scheme)`, by name, with the leading axes `stack`;
    `k` is how many inputs the site has. Where nothing was seen the scale is that of zeros.
    `histogram` is the observer, if it was not the usual one.

    **Raises:** `ValueError` as `static_observers`, where a statistic is missing, or tiles do not
    fill the inputs.
    """
    for observer in static_observers(scheme):
        if observer.name not in statistics:
            raise ValueError(
                f"The static scale of {scheme} needs {observer}, and the statistics are "
                f"{', '.join(statistics) or 'none'}. Observe with static_observers(scheme)."
            )
    tile = scheme.tile.contracted or k
    if k % tile:
        raise ValueError(f"Tiles of {tile} do not fill {k} inputs. Use a divisor, or None for all.")
    seen = _ends(statistics, (*stack, k // tile, tile))
    rule, factor = scheme.range, None
    if isinstance(rule, (Percentile, MeanSquaredError)):
        how = histogram or Histogram()
        found = statistics[how.name]
        if isinstance(rule, Percentile):
            seen, rule = _cut(seen, rule, how, found, scheme.zero_point is not None)
        else:
            values, counts = how.sample(found)
            sample = jnp.asarray(values, jnp.float32), jnp.asarray(counts, jnp.float32)
            factor = _least_error(seen, *sample, scheme, rule)
            rule = rule.base
    scale, low = _range(seen, scheme, rule)
    if factor is not None:
        scale, low = scale * factor, None if low is None else low * factor
    assert isinstance(scheme.scale, Format)
    held = decode(stored_scale(scale, scheme.scale), scheme.scale, jnp.float32)
    if low is None:
        return {"scale": held}
    assert scheme.zero_point is not None
    zero = stored_zero_point(zero_point(low, held, scheme.values), scheme.zero_point)
    return {"scale": held, "zero_point": zero}


def _convention(rule: MeanSquaredError) -> Convention:
    return getattr(rule.base, "convention", Convention.HIGHEST)


def _ends(
    statistics: Mapping[str, Any], shape: tuple[int, ...]
) -> Float[Array, "*stack tiles ends"]:
    """Values with the least and the largest of each tile: zeros where nothing was seen."""
    if "extremes" not in statistics:
        return jnp.zeros((*shape[:-1], 2))
    low, high = (jnp.asarray(statistics["extremes"][end]) for end in ("low", "high"))
    some = low <= high
    both = [jnp.where(some, end, 0.0).reshape(shape) for end in (low, high)]
    return jnp.concatenate(both, axis=-1)


def _cut(
    seen: Float[Array, "*stack tiles ends"],
    rule: Percentile,
    histogram: Histogram,
    found: Mapping[str, Any],
    asymmetric: bool,
) -> tuple[Float[Array, "*stack tiles _"], Range]:
    """The ends that hold so many of the values, and the rule that takes them as they are."""
    if asymmetric:
        low, high = histogram.interval(found, rule.percent)
        ends, rest = np.stack([np.minimum(low, 0), np.maximum(high, 0)], axis=-1), MinMax()
    else:
        ends = np.asarray(histogram.percentile(found, rule.percent))[..., None]
        rest = AbsMax(convention=rule.convention)
    return jnp.asarray(ends, jnp.float32).reshape(*seen.shape[:-1], -1), rest


def _range(
    seen: Float[Array, "*stack tiles ends"], scheme: Scheme, rule: Range
) -> tuple[Float[Array, "*stack tiles"], Float[Array, "*stack tiles"] | None]:
    """The scale, and where the range begins if the scheme has zero points."""
    axis = (seen.ndim - 1,)
    if scheme.zero_point is None:
        return symmetric_scale(seen, axis, rule, scheme.values)[..., 0], None
    scale, low = asymmetric_scale(seen, axis, rule, scheme.values, real_zero=scheme.real_zero_point)
    return scale[..., 0], low[..., 0]


@functools.partial(jax.jit, static_argnames=("scheme", "rule"))
def _least_error(
    seen: Float[Array, "*stack tiles ends"],
    values: Float[Array, "*stack bins"],
    counts: Float[Array, "*stack bins"],
    scheme: Scheme,
    rule: MeanSquaredError,
) -> Float[Array, "*stack tiles"]:
    """The factor of the grid with which rounding what the histogram holds errs least.

    The widest of equals, as `MeanSquaredError` says.
    """
    scale, low = _range(seen, scheme, rule.base)
    share = counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1.0)
    zero = None
    if low is not None:
        zero = zero_point(low, scale, scheme.values)
        zero = zero if scheme.real_zero_point else jnp.round(zero)

    def loss(factor: Float[Array, ""]) -> Float[Array, "*stack tiles"]:
        shifted = values * (1 / (scale * factor))
        if zero is None:
            rounded = decode(encode(shifted, scheme.values), scheme.values, jnp.float32)
        else:
            placed = (
                offset_by(shifted, zero) if scheme.real_zero_point else jnp.round(shifted) + zero
            )
            rounded = decode(encode(placed, scheme.values), scheme.values, jnp.float32) - zero
        # In units of the widest scale, so that the power of a tiny error is not flushed to 0.
        error = jnp.abs(rounded * factor - values * (1 / scale))
        return (share * error**rule.power).sum(axis=-1, keepdims=True)

    factors = 1 - jnp.arange(max(1, int(rule.shrink * rule.grid)), dtype=jnp.float32) / rule.grid

    def step(i: Any, best: tuple[Array, Array]) -> tuple[Array, Array]:
        least, kept = best
        now = loss(factors[i])
        return jnp.minimum(least, now), jnp.where(now < least, factors[i], kept)

    return lax.fori_loop(1, len(factors), step, (loss(factors[0]), jnp.ones_like(scale)))[1]
