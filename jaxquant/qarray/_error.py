"""What holding an array in few bits did to it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ._layout import CANONICAL
from ._qarray import dequantize, QArray, scale_values, stored_values

# Sums of squares between these are exact enough as they are: no square of a weight that counts, and
# none of its errors, was flushed to 0 or became infinite.
_LEAST, _MOST = 1e-15, 1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightError:
    """Errors of a weight `w` held as `q`.

    `relative` is `|q - w| / |w|` in the Frobenius norm, `largest` the largest `|q - w|` of a value.
    """

    relative: float
    largest: float

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise in decibels: `10 log10(sum w^2 / sum (q - w)^2)`.

        `None` where there is no noise.
        """
        return -20.0 * math.log10(self.relative) if self.relative > 0 else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorSums:
    """`sum w^2`, `sum (q - w)^2` and `max |q - w|` of a weight times a factor, on the device."""

    signal: Any
    noise: Any
    largest: Any


def square_sum(x: Float[Array, "..."]) -> Float[Array, ""]:
    """`sum x^2` in float32, row by row and then of the rows. Not finite if a value is not."""
    # One sum over everything takes XLA's CPU compiler ten times as long as sums of rows: a barrier
    # keeps it from making one of the two.
    rows = lax.optimization_barrier(jnp.square(x).sum(axis=-1)) if x.ndim > 1 else jnp.square(x)
    return rows.sum()


def error_sums(w: Float[Array, "..."], q: QArray, factor: Any = 1.0) -> ErrorSums:
    """The sums of `weight_error`, of the weight times a power of two; for use in `jit`."""
    wide = w.astype(jnp.float32)
    off = _off(wide, q) * factor
    # What two sums read is written to memory first, unless it is made of other arrays.
    again = jnp.abs(_off(*lax.optimization_barrier((wide, q)))) * factor
    rows = lax.optimization_barrier(again.max(axis=-1)) if again.ndim > 1 else again
    largest = rows.max(initial=0.0)
    return ErrorSums(signal=square_sum(wide * factor), noise=square_sum(off), largest=largest)


def _off(w: Float[Array, "..."], q: QArray) -> Float[Array, "..."]:
    """`q - w`, by the equation of `dequantize`.

    Scales meet their tiles on axes of the tiles' own: the CPU compiler adds up the squares of that
    in half the time that it takes with scales repeated along the axes of `w`.
    """
    if q.ragged or q.layout != CANONICAL:
        return dequantize(q, jnp.float32) - w
    axes = list(zip(q.codes.shape, q.tile, strict=True))
    cut = [part for n, t in axes for part in ((n // t, t) if 1 < t < n else (n,))]
    held = [part for n, t in axes for part in ((n // t, 1) if 1 < t < n else (n // t,))]
    values = stored_values(q, jnp.float32).reshape(cut)
    if q.zero_point is not None:
        values = values - q.zero_point.astype(jnp.float32).reshape(held)
    values = values * scale_values(q).reshape(held)
    if q.offset is not None:
        # The mean that was taken off, one for all but the stack axes.
        values = values.reshape(w.shape) + q.offset
    return values.reshape(w.shape) - w


_error_sums = jax.jit(error_sums)


def weight_error(w: Any, q: QArray) -> WeightError:
    """Compares `q` with the array `w` that it was made from; sums in float32.

    **Raises:** `ValueError` if they have different shapes.
    """
    if tuple(w.shape) != q.shape:
        raise ValueError(
            f"A weight of shape {tuple(w.shape)} cannot be compared with one of {q.shape}."
        )
    w = w if isinstance(w, jax.Array) else jnp.asarray(np.asarray(w))
    return error_from(_error_sums(w, q), w, q)


def array_error(w: Any, held: Any) -> WeightError:
    """As `weight_error`, for what is held as the numbers that it stands for."""
    wide = jnp.asarray(w).astype(jnp.float32)
    peak = float(jnp.abs(wide).max(initial=0.0))
    unit = peak if peak > 0 else 1.0
    off = (held.astype(jnp.float32) - wide) / unit
    signal, noise = float(square_sum(wide / unit)), float(square_sum(off))
    relative = math.sqrt(noise / signal) if signal > 0 else 0.0
    return WeightError(relative=relative, largest=float(jnp.abs(off).max(initial=0.0)) * unit)


def error_from(sums: ErrorSums, w: Any, q: QArray) -> WeightError:
    """The error that `sums` (with the factor 1) tell, or that sums of `w` in its own unit tell.

    Squares of numbers near the ends of float32 are 0 or infinite; then the weight is measured in
    units of its largest value.
    """
    factor = 1.0
    if w.size and not _LEAST < float(sums.signal) < _MOST:
        peak = float(jnp.abs(w).max())
        if peak > 0:
            # Not below 2**-126: such a factor would be flushed to 0 itself.
            factor = 2.0 ** -min(max(math.frexp(peak)[1], -126), 126)
            sums = _error_sums(w, q, factor)
    signal, noise = float(sums.signal), float(sums.noise)
    relative = math.sqrt(noise / signal) if signal > 0 else 0.0
    return WeightError(relative=relative, largest=float(sums.largest) / factor)
