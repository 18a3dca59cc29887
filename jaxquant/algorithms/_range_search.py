"""Ranges chosen by what inputs make of errors: each scale is tried in several sizes."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

from ..intercept import Moments
from ..numerics import decode, Format
from ..numerics._cast import nearest_in_bytes
from ..numerics._scale import zero_point as zero_point_of
from ..qarray import Scheme, tile_shape
from ..qarray._quantize import stored_scale, stored_zero_point, wanted_scale
from ._matrix import Chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeSearch:
    """Rounding to nearest, with each tile's range chosen by the error that its inputs make of it.

    The range that the scheme's rule gives is tried as it is and in `steps` sizes from `least` to
    `most` times its own, and of these the one is taken for which `sum_j h_j (w_j - round(w_j))^2`
    over the tile is least, where `h_j` is the mean square of input `j`. That is the error of the
    tile's own output if inputs were not correlated; unlike a search by the weights alone it knows
    which columns matter. Symmetric formats whose ends differ (-8 and 7) are tried with both signs
    of the scale, and ranges with a zero point at both ends apart, each size with each.

    `least` is for formats of 4 bits and more; narrower ones are searched from `least_narrow`.
    """

    least: float = 0.6
    least_narrow: float = 0.4
    most: float = 1.05
    steps: int = 12
    name: str = "range_search"

    def __post_init__(self) -> None:
        if not 0 < self.least_narrow <= self.least < self.most or self.steps < 2:
            raise ValueError(
                "A range search takes 0 < least_narrow <= least < most and at least 2 steps; got "
                f"{self}."
            )

    @property
    def observers(self) -> tuple[Moments, ...]:
        return (Moments(),)

    def run(
        self, w: Float[Array, "*stack n k"], statistics: Mapping[str, Any], scheme: Scheme
    ) -> Chosen:
        """Codes and scales of `w` in matrix form, from `statistics["moments"]["square"]`.

        **Raises:** `ValueError` for schemes whose scales are held as codes or that are centered.
        """
        check_searchable(scheme)
        square = jnp.asarray(statistics["moments"]["square"])
        return _rounded(w.astype(jnp.float32), square, scheme, self)


def check_searchable(scheme: Scheme) -> None:
    """Refuses schemes whose scales depend on each other.

    **Raises:** `ValueError`.
    """
    if isinstance(scheme.scale, Scheme) or scheme.centered or scheme.scale.power_of_two:
        raise ValueError(
            f"A range search chooses each scale by itself, and those of {scheme} are held as "
            "codes, are powers of two, or lie around a mean. Leave out the search, or give the "
            "scheme plain scales."
        )


@functools.partial(jax.jit, static_argnames=("scheme", "how"))
def _rounded(w: Any, square: Any, scheme: Scheme, how: RangeSearch) -> Chosen:
    def one(pair: Any) -> Chosen:
        w, square = pair
        scale, zero = searched(w, square, scheme, how)
        shape = _Tiles.of(w.shape, scheme)
        zeros = None if zero is None else zero.astype(jnp.float32)
        _, codes = _round(shape.split(w), _held(scale, scheme), zeros, scheme)
        return Chosen(codes=shape.join(codes), scale=scale, zero_point=zero)

    if w.ndim == 2:
        return one((w, square))
    stack = w.shape[:-2]
    flat = (w.reshape(-1, *w.shape[-2:]), square.reshape(-1, square.shape[-1]))
    found = lax.map(one, flat)
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), found)


def searched(
    w: Float[Array, "n k"], importance: Float[Array, " k"], scheme: Scheme, how: RangeSearch
) -> tuple[Shaped[Array, "tn tk"], Shaped[Array, "tn tk"] | None]:
    """The scale of each tile, and its zero point if the scheme has them, as they are stored."""
    shape = _Tiles.of(w.shape, scheme)
    wide = shape.split(w)
    weight = shape.split(jnp.broadcast_to(importance.astype(jnp.float32), w.shape))
    base, low = wanted_scale(w, scheme, (shape.rows, shape.width))
    assert isinstance(scheme.scale, Format)
    least = how.least if scheme.values.bits >= 4 else how.least_narrow
    sizes = np.linspace(least, how.most, how.steps)
    # The whole range first, so that of equals it is the one that is kept.
    sizes = np.array([1.0, *sizes[np.argsort(np.abs(sizes - 1.0), kind="stable")]])

    def loss(scale: Any, zero: Any) -> Any:
        values, _ = _round(wide, scale, zero, scheme)
        return (jnp.square(values - wide) * weight).sum(axis=(1, 3))

    if low is None:
        signs = (1.0, -1.0) if _lopsided(scheme.values) else (1.0,)
        factors = jnp.asarray([s * f for f in sizes for s in signs], jnp.float32)

        def symmetric(i: Any) -> tuple[Any, Any]:
            return stored_scale(base * factors[i], scheme.scale), None  # type: ignore[arg-type]

        return _least(symmetric, len(factors), loss, scheme)
    high = low + base * np.float32(scheme.values.highest - scheme.values.lowest)
    pairs = [(a, b) for a in sizes for b in sizes]
    ends = jnp.asarray(sorted(pairs, key=lambda p: abs(p[0] - 1) + abs(p[1] - 1)), jnp.float32)
    reach = np.float32(1 / (scheme.values.highest - scheme.values.lowest))

    def asymmetric(i: Any) -> tuple[Any, Any]:
        lower, upper = low * ends[i, 0], high * ends[i, 1]
        wanted = jnp.where(upper > lower, (upper - lower) * reach, base)
        scale = stored_scale(wanted, scheme.scale)  # type: ignore[arg-type]
        assert scheme.zero_point is not None
        zero = zero_point_of(lower, _held(scale, scheme), scheme.values)
        return scale, stored_zero_point(zero, scheme.zero_point)

    return _least(asymmetric, len(ends), loss, scheme)


def _least(candidate: Any, count: int, loss: Any, scheme: Scheme) -> Any:
    """Of `count` candidates, for each tile the first whose loss is the least."""

    def measured(i: Any) -> Any:
        scale, zero = candidate(i)
        value = None if zero is None else zero.astype(jnp.float32)
        return loss(_held(scale, scheme), value), scale, zero

    def step(i: Any, best: Any) -> Any:
        now, *parts = measured(i)
        better = now < best[0]
        kept = [
            None if new is None else _where(better, new, old)
            for new, old in zip(parts, best[1:], strict=True)
        ]
        return (jnp.where(better, now, best[0]), *kept)

    _, scale, zero = lax.fori_loop(1, count, step, tuple(measured(0)))
    return scale, zero


def _where(mask: Any, new: Any, old: Any) -> Any:
    if new.dtype.itemsize > 1 or new.dtype in (jnp.int8, jnp.uint8):
        return jnp.where(mask, new, old)
    # Narrow codes are chosen among as bytes.
    return jnp.where(mask, new.astype(jnp.int8), old.astype(jnp.int8)).astype(new.dtype)


def _held(scale: Any, scheme: Scheme) -> Any:
    assert isinstance(scheme.scale, Format)
    return decode(scale, scheme.scale, jnp.float32)


def _lopsided(values: Format) -> bool:
    """Whether one end reaches further, so that a scale below 0 gives the other side more room."""
    return values.signed and values.lowest != -values.highest


def _byte(values: Format) -> Any:
    return jnp.int8 if values.signed else jnp.uint8


def _round(wide: Any, scale: Any, zero: Any, scheme: Scheme) -> tuple[Any, Any]:
    """Values of tiles rounded to nearest for given scales, and their codes."""
    values = scheme.values
    each = scale[:, None, :, None]
    shifted = wide * (1.0 / each)
    if not values.integer:
        found, codes = nearest_in_bytes(shifted, values)
        return found * each, codes
    if zero is None:
        codes = jnp.clip(jnp.round(shifted), values.lowest, values.highest)
        return codes * each, codes.astype(_byte(values))
    middle = zero[:, None, :, None]
    placed = shifted + middle if scheme.real_zero_point else jnp.round(shifted) + middle
    codes = jnp.clip(jnp.round(placed), values.lowest, values.highest)
    return (codes - middle) * each, codes.astype(_byte(values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tiles:
    """How a matrix splits into tiles of `rows` by `width`; the last along a row may be short."""

    n: int
    k: int
    rows: int
    width: int

    @classmethod
    def of(cls, shape: tuple[int, ...], scheme: Scheme) -> "_Tiles":
        n, k = shape
        rows, width = tile_shape((n, k), scheme.tile, contracted=(1,))
        if n % rows:
            raise ValueError(
                f"A range search takes tiles whose {rows} rows divide the {n} of the weight. Use "
                "Tile(kept=1), or another divisor."
            )
        return cls(n=n, k=k, rows=rows, width=width)

    @property
    def across(self) -> int:
        return math.ceil(self.k / self.width)

    def split(self, x: Float[Array, "n k"]) -> Float[Array, "tn rows tk width"]:
        """Zeros fill a short tile up: they are rounded to 0 or count for nothing."""
        x = jnp.pad(x, ((0, 0), (0, self.across * self.width - self.k)))
        return x.reshape(self.n // self.rows, self.rows, self.across, self.width)

    def join(self, x: Shaped[Array, "tn rows tk width"]) -> Shaped[Array, "n k"]:
        return x.reshape(self.n, self.across * self.width)[:, : self.k]
