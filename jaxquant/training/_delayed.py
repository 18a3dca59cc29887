"""Delayed scaling: scales that follow the largest magnitudes of earlier steps.

After Transformer Engine's `DelayedScaling`. Between two steps the magnitude that was seen goes to
the front of the history, the oldest falls out, and the scale is made anew (times `2 ** margin`):

| newest magnitude | history | scale |
|---|---|---|
| positive, finite | it enters | the largest of the history, over the format's end |
| 0 | it enters | the same; where the whole history is 0, as before |
| infinite, NaN | 0 enters | as before |

A magnitude so small that its scale would vanish takes the least scale whose reciprocal is finite.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..numerics import Format
from ..numerics._scale import TINY
from ._estimators import Delayed


def first_delayed(
    delayed: Delayed,
    format: Format,
    shape: tuple[int, ...],
    peak: Float[Array, "*tiles"] | None = None,
) -> dict[str, Any]:
    """The scale, of `shape`, and its history before the first step: of a known `peak`, else 1."""
    peaks = jnp.zeros((*shape, delayed.history), jnp.float32)
    start = {"scale": jnp.ones(shape, jnp.float32), "peaks": peaks}
    return start if peak is None else moved_scale(delayed, format, start, peak)


def moved_scale(
    delayed: Delayed, format: Format, held: dict[str, Any], peak: Float[Array, "*tiles"]
) -> dict[str, Any]:
    """The scale and its history after a step that saw `peak` as largest magnitude."""
    seen = jnp.isfinite(peak)
    newest = jnp.where(seen, peak, 0.0).astype(jnp.float32)[..., None]
    peaks = jnp.concatenate([newest, held["peaks"][..., :-1]], axis=-1)
    largest = newest[..., 0] if delayed.latest else peaks.max(-1)
    wanted = jnp.maximum(largest * np.float32(2.0**delayed.margin / format.highest), TINY)
    usable = seen & (largest > 0) & jnp.isfinite(wanted)
    return {"scale": jnp.where(usable, wanted, held["scale"]), "peaks": peaks}


def peak_of(x: Float[Array, "..."], stack: tuple[int, ...] = ()) -> Float[Array, "*stack 1"]:
    """The largest magnitude, of each entry of the stack axes; NaN if there is one."""
    wide = jnp.moveaxis(jnp.abs(x.astype(jnp.float32)), stack, range(len(stack)))
    return wide.reshape(*wide.shape[: len(stack)], -1).max(-1, keepdims=True)


def peaks_by_tile(x: Float[Array, "..."], tile: tuple[int, ...]) -> Float[Array, "*tiles"]:
    """The same of each tile, where tiles hold an axis whole or are 1 along it."""
    whole = tuple(a for a, (n, t) in enumerate(zip(x.shape, tile, strict=True)) if n == t)
    return jnp.abs(x.astype(jnp.float32)).max(whole, keepdims=True)
