"""Observers: statistics of what flows into a site, which add up over batches and devices.

An observer has four questions: `measure` (of rows), `merge` (of two), `empty` (of nothing, for the
shapes that `measure` gives) and `reduce` (over mesh axes, inside a `shard_map`). Merging is
associative and commutative, up to the rounding of float sums; counts, peaks, ends and histograms
are exact. `_accumulate` adds up in a fixed order, for sums that are equal to the bit too.

Values that are not finite are never left out: they end up in the sums, and `Moments` and `Count`
say how many rows had one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ._histogram import Histogram
from ._rows import gram, largest, Rows, total, values


def _zeros(struct: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), struct)


def _added(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _counts(x: Rows) -> dict[str, Array]:
    bad = jnp.logical_not(jnp.isfinite(values(x)).all(axis=-1))
    # Counted from `x`, so that inside `shard_map` the count varies with the rows it counts.
    return {
        "rows": total(x, jnp.where(bad, 1, 1).astype(jnp.int32)),
        "nonfinite": total(x, bad.astype(jnp.int32)),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
    """How many rows (tokens) there were, and how many of them held NaN or an infinity: `[*stack]`.

    Of a ragged product: for each expert.
    """

    name: str = "count"

    def measure(self, x: Rows) -> dict[str, Array]:
        return _counts(x)

    def merge(self, a: Any, b: Any) -> Any:
        return _added(a, b)

    def empty(self, struct: Any) -> Any:
        return _zeros(struct)

    def reduce(self, x: Any, axes: tuple[str, ...]) -> Any:
        return lax.psum(x, axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Those of `Count`, and sums of magnitudes and of squares, per contracted channel."""

    name: str = "moments"

    def measure(self, x: Rows) -> dict[str, Array]:
        return {
            **_counts(x),
            "magnitude": total(x, jnp.abs(values(x))),
            "square": total(x, jnp.square(values(x))),
        }

    def merge(self, a: Any, b: Any) -> Any:
        return _added(a, b)

    def empty(self, struct: Any) -> Any:
        return _zeros(struct)

    def reduce(self, x: Any, axes: tuple[str, ...]) -> Any:
        return lax.psum(x, axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """The largest magnitude per contracted channel; 0 where nothing was seen."""

    name: str = "peak"

    def measure(self, x: Rows) -> Float[Array, "*stack k"]:
        return largest(x, jnp.abs(values(x)), 0.0)

    def merge(self, a: Any, b: Any) -> Any:
        return jnp.maximum(a, b)

    def empty(self, struct: Any) -> Any:
        return _zeros(struct)

    def reduce(self, x: Any, axes: tuple[str, ...]) -> Any:
        return lax.pmax(x, axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extremes:
    """Least and largest value per contracted channel; infinity and minus that of nothing."""

    name: str = "extremes"

    def measure(self, x: Rows) -> dict[str, Float[Array, "*stack k"]]:
        seen = values(x)
        return {"low": -largest(x, -seen, -np.inf), "high": largest(x, seen, -np.inf)}

    def merge(self, a: Any, b: Any) -> Any:
        return {"low": jnp.minimum(a["low"], b["low"]), "high": jnp.maximum(a["high"], b["high"])}

    def empty(self, struct: Any) -> Any:
        low, high = struct["low"], struct["high"]
        return {
            "low": jnp.full(low.shape, np.inf, low.dtype),
            "high": jnp.full(high.shape, -np.inf, high.dtype),
        }

    def reduce(self, x: Any, axes: tuple[str, ...]) -> Any:
        return {"low": lax.pmin(x["low"], axes), "high": lax.pmax(x["high"], axes)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gram:
    """`x^T x` in float32: all that second-order algorithms need to know of the inputs.

    `precision` is that of the products. Inputs in bfloat16 lose nothing with `DEFAULT`, which
    accelerators compute several times as fast.
    """

    name: str = "gram"
    precision: lax.Precision = lax.Precision.HIGHEST

    def measure(self, x: Rows) -> Float[Array, "*stack k k"]:
        return gram(x, self.precision)

    def merge(self, a: Any, b: Any) -> Any:
        return a + b

    def empty(self, struct: Any) -> Any:
        return _zeros(struct)

    def reduce(self, x: Any, axes: tuple[str, ...]) -> Any:
        return lax.psum(x, axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift:
    """`(y - x)^T x`, `[*stack, k, k]`, of inputs `x` in a quantized model and `y` in the float one.

    It says how they depart from each other, as far as `x` tells.

    It is `measure`d of two sets of rows, so only calibration, which runs both models, can have it.
    """

    name: str = "drift"

    def measure(self, x: Any, y: Any) -> Float[Array, "*stack k k"]:
        return jnp.einsum("...rk,...rl->...kl", y - x, x, precision=lax.Precision.HIGHEST)

    def merge(self, a: Any, b: Any) -> Any:
        return a + b


Observer = Count | Moments | Peak | Extremes | Gram | Histogram


def mean_magnitude(moments: Mapping[str, Array]) -> Float[Array, "*stack k"]:
    """The mean of magnitudes per channel, from `Moments`; 0 where nothing was seen."""
    rows = jnp.maximum(moments["rows"], 1).astype(jnp.float32)
    return moments["magnitude"] / rows[..., None]


def nonfinite(statistics: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The sites that saw NaN or an infinity, with the number of such rows, in order.

    Knows what `Moments`, `Count` or `Histogram` saw.

    **Raises:** `ValueError` for a site that none of them watched.
    """
    found: dict[str, int] = {}
    for site, parts in statistics.items():
        counts = [
            p["nonfinite"] for p in parts.values() if isinstance(p, dict) and "nonfinite" in p
        ]
        if not counts:
            raise ValueError(
                f"Nothing says whether {site} saw values that are not finite: it has "
                f"{', '.join(parts) or 'no statistics'}. Observe with Count() or Moments() too."
            )
        count = int(np.max([np.asarray(c, np.int64).sum() for c in counts]))
        if count:
            found[site] = count
    return found
