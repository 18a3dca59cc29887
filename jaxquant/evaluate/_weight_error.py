"""What quantizing did to one weight."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..qarray import dequantize, QArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightError:
    """Errors of a weight `w` held as `q`.

    `relative` is `|q - w| / |w|` in the Frobenius norm, `largest` the largest `|q - w|` of a value.
    """

    relative: float
    largest: float

    @property
    def snr_db(self) -> float | None:
        """Signal to noise in decibels, `-20 log10(relative)`; `None` where there is no noise."""
        return -20.0 * math.log10(self.relative) if self.relative > 0 else None


@jax.jit
def _sums(w: Float[Array, "..."], q: QArray) -> tuple[Array, Array, Array]:
    wide = w.astype(jnp.float32)
    off = dequantize(q, jnp.float32) - wide
    return jnp.sum(jnp.square(off)), jnp.sum(jnp.square(wide)), jnp.max(jnp.abs(off))


def weight_error(w: Any, q: QArray) -> WeightError:
    """Compares `q` with the array `w` that it was made from; sums in float32.

    **Raises:** `ValueError` if they have different shapes.
    """
    if tuple(w.shape) != q.shape:
        raise ValueError(
            f"A weight of shape {tuple(w.shape)} cannot be compared with one of {q.shape}."
        )
    noise, signal, largest = (float(x) for x in _sums(jnp.asarray(np.asarray(w)), q))
    relative = math.sqrt(noise / signal) if signal > 0 else 0.0
    return WeightError(relative=relative, largest=largest)
