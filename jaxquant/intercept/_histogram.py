"""A histogram of values whose merging is exact, and ranges taken from it.

**Bins.** Every float32 magnitude has an octave (its exponent) and a place in it; an octave is cut
into `per_octave` bins of equal width. Kept are the `octaves` octaves up to that of the largest
magnitude seen, for values below 0 and for the others; what is smaller falls into one bin at 0. When
a larger value comes the window moves up by whole octaves, and the bins that leave it below are
added to the one at 0. Bins of any two windows are nested and the window depends on the peak alone,
so that merging gives the histogram of all values, in whatever order and by however many devices:
the counts are whole numbers, in two limbs of 20 and 31 bits.

**Resolution.** A value is known to its bin, whose width is at most `1 / per_octave` of it: a
percentile is off by half of that at most. Below the window, by `2 ** (1 - octaves)` of the peak.
The largest and the least value are known as they are.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ._rows import Grouped, Rows, total, values

LIMB = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Histogram:
    """How often which values occur, of all channels together: for percentiles and clipping.

    `counts` is `[*stack, 2, bins, 2]`: values below 0 and others, by magnitude, in two limbs;
    `top` `[*stack]` is the (biased) exponent of the window's highest octave, `low` and `high` are
    the least and largest value, `nonfinite` the number of values in no bin: NaN and infinities.
    """

    name: str = "histogram"
    per_octave: int = 64
    octaves: int = 24

    def __post_init__(self) -> None:
        per = self.per_octave
        if not (1 <= per <= 2**23 and per & (per - 1) == 0 and 1 <= self.octaves <= 254):
            raise ValueError(
                f"A histogram has a power of two of bins per octave, and 1 to 254 octaves; got "
                f"per_octave={per}, octaves={self.octaves}."
            )

    @property
    def bins(self) -> int:
        return self.octaves * self.per_octave + 1

    @property
    def _shift(self) -> int:
        return 23 - (self.per_octave.bit_length() - 1)

    def measure(self, x: Rows) -> dict[str, Array]:
        seen = values(x).astype(jnp.float32)
        finite = jnp.isfinite(seen)
        if isinstance(x, Grouped):
            stack, slices = (x.sizes.shape[0],), x.groups
            good = finite & x.belongs[:, None]
        else:
            stack, good = seen.shape[:-2], finite
            slices = jnp.arange(math.prod(stack), dtype=jnp.int32).reshape(*stack, 1)

        def most(each: Array, least: Any) -> Array:
            """The largest of each slice: first of each row."""
            each = jnp.where(good, each, least).max(axis=-1, initial=least)
            if isinstance(x, Grouped):
                return jnp.maximum(jax.ops.segment_max(each, slices, stack[0]), least)
            return each.max(axis=-1, initial=least)

        highest, lowest = most(seen, -jnp.inf), -most(-seen, -jnp.inf)
        bits = lax.bitcast_convert_type(jnp.abs(seen), jnp.int32)
        top = most(bits >> 23, np.int32(0))
        first = (top + 1 - self.octaves) * self.per_octave
        # Rows of no group have no window; none of their values is counted.
        window = first[jnp.minimum(slices, stack[0] - 1)] if isinstance(x, Grouped) else first
        window = window[:, None] if isinstance(x, Grouped) else window[..., None, None]
        place = jnp.maximum((bits >> self._shift) - window + 1, 0)
        # -0.0 stands with 0.0: both are no less than 0.
        sign = jnp.where(seen < 0, 0, 1)
        index = (slices[..., None] * 2 + sign) * self.bins + place
        size = math.prod(stack) * 2 * self.bins
        index = jnp.where(good, index, size).reshape(-1)
        counts = jnp.zeros(size, jnp.int32).at[index].add(1, mode="drop")
        counts = counts.reshape(*stack, 2, self.bins)
        bad = jnp.logical_not(finite).sum(axis=-1, dtype=jnp.int32)
        return {
            "counts": jnp.stack([counts & (2**LIMB - 1), counts >> LIMB], axis=-1),
            "top": top,
            "low": lowest,
            "high": highest,
            "nonfinite": total(x, bad),
        }

    def merge(self, a: Any, b: Any) -> Any:
        top = jnp.maximum(a["top"], b["top"])
        return {
            "counts": _carried(self._moved(a, top) + self._moved(b, top)),
            "top": top,
            "low": jnp.minimum(a["low"], b["low"]),
            "high": jnp.maximum(a["high"], b["high"]),
            "nonfinite": a["nonfinite"] + b["nonfinite"],
        }

    def _moved(self, have: Any, top: Array) -> Array:
        """The counts in a window whose highest octave is `top`."""
        steps = (top - have["top"]) * self.per_octave

        def move(counts: Array, step: Array) -> Array:
            place = jnp.maximum(jnp.arange(self.bins, dtype=step.dtype) - step, 0)
            return jnp.zeros_like(counts).at[:, place].add(counts)

        counts = have["counts"].reshape(-1, *have["counts"].shape[-3:])
        moved = jax.vmap(move)(counts, steps.reshape(-1))
        return _carried(moved.reshape(have["counts"].shape))

    def empty(self, struct: Any) -> Any:
        full = {"low": np.inf, "high": -np.inf}
        return {n: jnp.full(s.shape, full.get(n, 0), s.dtype) for n, s in struct.items()}

    def reduce(self, x: Any, axes: tuple[str, ...]) -> Any:
        top = lax.pmax(x["top"], axes)
        return {
            "counts": _carried(lax.psum(self._moved(x, top), axes)),
            "top": top,
            "low": lax.pmin(x["low"], axes),
            "high": lax.pmax(x["high"], axes),
            "nonfinite": lax.psum(x["nonfinite"], axes),
        }

    def sample(self, found: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Values in increasing order and how often they occur, each `[*stack, 2 * bins]`.

        The middle of each bin stands for what is in it, and the bin at 0 for 0; none lies beyond
        what was seen. Both in float64.
        """
        limbs = np.asarray(found["counts"]).astype(np.int64)
        counts = limbs[..., 0] + (limbs[..., 1] << LIMB)
        top = np.asarray(found["top"]).astype(np.int64)
        low, high = (np.asarray(found[end], np.float64)[..., None] for end in ("low", "high"))
        first = (top[..., None] + 1 - self.octaves) * self.per_octave
        edges = _edge(first + np.arange(self.bins), self._shift)
        middles = (edges[..., :-1] + edges[..., 1:]) / 2
        middles = np.concatenate([np.zeros_like(middles[..., :1]), middles], axis=-1)
        both = np.concatenate([-middles[..., ::-1], middles], axis=-1)
        seen = np.concatenate([counts[..., 0, ::-1], counts[..., 1, :]], axis=-1)
        # Where nothing was seen there are no ends to keep to.
        some = low <= high
        return np.clip(both, np.where(some, low, 0), np.where(some, high, 0)), seen.astype(
            np.float64
        )

    def percentile(self, found: Mapping[str, Any], percent: float) -> np.ndarray:
        """What `percent` of the magnitudes do not exceed: `[*stack]`, 0 where nothing was seen.

        Between neighbours it is interpolated, as `jax.numpy.percentile` does. Off by half a bin
        at most: `value / (2 * per_octave)`, or `2 * peak / 2**octaves` where that is more.

        **Raises:** `ValueError` if `percent` is not between 0 and 100.
        """
        values, counts = self.sample(found)
        half = values.shape[-1] // 2
        folded = counts[..., half:] + counts[..., :half][..., ::-1]
        lows, highs = np.abs(values[..., :half][..., ::-1]), values[..., half:]
        # The sides may differ in their outermost bin, which ends at what was seen.
        magnitudes = np.maximum(lows, highs)
        peak = np.maximum(-np.asarray(found["low"]), np.asarray(found["high"]))
        return _quantile(magnitudes, folded, percent, -np.inf, peak)

    def interval(self, found: Mapping[str, Any], percent: float) -> tuple[np.ndarray, np.ndarray]:
        """The range that holds `percent` of the values: as much is cut from one end as the other.

        `(low, high)`, each `[*stack]`. As exact as `percentile`.
        """
        values, counts = self.sample(found)
        ends = ((100 - percent) / 2, (100 + percent) / 2)
        limits = (np.asarray(found["low"]), np.asarray(found["high"]))
        low, high = (_quantile(values, counts, end, *limits) for end in ends)
        return low, high

    def least_error(
        self,
        found: Mapping[str, Any],
        rounded: Callable[[np.ndarray, float, float], np.ndarray],
        *,
        symmetric: bool = True,
        grid: int = 100,
        shrink: float = 0.8,
        power: float = 2.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The range, shrunk to where rounding errs least: `(low, high)`, each `[*stack]`.

        `rounded(values, low, high)` is what a scheme makes of values when its range is that. Of the
        factors `1 - i / grid` for `i < shrink * grid`, the one with the least sum of
        `|error| ** power`; the widest of equals. `symmetric` keeps the ends equally far from 0,
        otherwise both shrink towards it.
        """
        values, counts = self.sample(found)
        low = np.minimum(np.asarray(found["low"], np.float64), 0)
        high = np.maximum(np.asarray(found["high"], np.float64), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        factors = 1 - np.arange(max(1, int(shrink * grid))) / grid
        best = np.ones(low.shape)
        for at in np.ndindex(low.shape):
            seen, often = values[at], counts[at]
            seen, often = seen[often > 0], often[often > 0]
            if not seen.size or high[at] == low[at]:
                continue
            losses = []
            for factor in factors:
                moved = rounded(seen, factor * low[at], factor * high[at]) - seen
                losses.append((often * np.abs(moved / (high[at] - low[at])) ** power).sum())
            best[at] = factors[int(np.argmin(losses))]
        return np.asarray(low * best), np.asarray(high * best)


def _carried(counts: Array) -> Array:
    """Both limbs, the lower of which may have more than its bits."""
    low, high = counts[..., 0], counts[..., 1]
    return jnp.stack([low & (2**LIMB - 1), high + (low >> LIMB)], axis=-1)


def _edge(key: np.ndarray, shift: int) -> np.ndarray:
    """Where the bin begins whose floats have the bits `key << shift`; 0 for what is below all."""
    bits = np.clip(key, 0, 255 << (23 - shift)).astype(np.int64) << shift
    exponent, fraction = bits >> 23, bits & (2**23 - 1)
    # Not by the bits themselves: the end of the last octave is no finite float32.
    normal = np.ldexp(1 + fraction / 2.0**23, (exponent - 127).astype(np.int32))
    return np.where(exponent == 0, np.ldexp(fraction.astype(np.float64), -149), normal)


def _quantile(
    values: np.ndarray, counts: np.ndarray, percent: float, first: Any, last: Any
) -> np.ndarray:
    """The percentile of values that are known to their bins, the first and the last one exactly."""
    if not 0 <= percent <= 100:
        raise ValueError(f"A percentile is between 0 and 100; got {percent}.")
    before = np.cumsum(counts, axis=-1)
    number = before[..., -1]
    rank = np.maximum(number - 1, 0) * (percent / 100)

    def at(rank: Any) -> Any:
        place = np.minimum((before <= rank[..., None]).sum(axis=-1), values.shape[-1] - 1)
        found = np.take_along_axis(values, place[..., None], axis=-1)[..., 0]
        found = np.where((rank == 0) & np.isfinite(first), first, found)
        return np.where(rank >= number - 1, last, found)

    below, above, part = at(np.floor(rank)), at(np.ceil(rank)), rank - np.floor(rank)
    # Ends of nothing are infinite: their difference would be no number.
    below, above = (np.where(number > 0, end, 0) for end in (below, above))
    return np.asarray(below + part * (above - below))
