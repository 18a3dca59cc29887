"""Rounding activations inside a kernel for TPU, as `quantize_activation` rounds them.

The bits are the same: maxima and products round alike everywhere, and for the one reciprocal a tile
Mosaic and XLA emit the same instructions on each generation of the chip (which need not give the
nearest float32, as a CPU does).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ...numerics import Format
from ...numerics._scale import TINY
from .. import _pallas as pallas

_ROWS = 32
"""Rows that are rounded at a time: as many as a register of bytes has."""
_LANES = 128
_SMALLEST = np.finfo(np.float32).tiny


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounding:
    """How plain activations become codes: of a tile, the highest code stands for its peak.

    `group` neighbours along `k` share a scale, which is `factor` times their peak.
    """

    format: Format
    factor: float
    group: int


def round_rows(
    x_ref: Any,
    codes_ref: Any,
    scale_ref: Any,
    rounding: Rounding,
    held: Callable[[Float[Array, "rows k"]], Array],
) -> None:
    """From `[rows, k]` to codes `[steps, rows, k]` and scales `[steps, rows, tiles]`.

    `held` makes of values of the format, in float32, what is kept of them.
    """
    rows = x_ref.shape[0]
    some = (x_ref, codes_ref, scale_ref, rounding, held)
    if rows % _ROWS == 0 and rows > _ROWS:

        def step(i: Any, _: Any) -> None:
            _round(*some, pallas.ds(i * _ROWS, _ROWS))

        lax.fori_loop(0, rows // _ROWS, step, None)
        return
    for at in range(0, rows, _ROWS):
        _round(*some, pallas.ds(at, min(_ROWS, rows - at)))


def _round(
    x_ref: Any, codes_ref: Any, scale_ref: Any, rounding: Rounding, held: Any, rows: Any
) -> None:
    k, length = x_ref.shape[1], codes_ref.shape[2]
    for tile, start in enumerate(range(0, k, rounding.group)):
        end = min(start + rounding.group, k)
        runs = [slice(at, min(at + _LANES, end)) for at in range(start, end, _LANES)]
        scale = _scale(_peak([x_ref[rows, run] for run in runs]), rounding.factor)
        step, at = divmod(tile, scale_ref.shape[2])
        scale_ref[step, rows, at : at + 1] = scale
        inverse = 1.0 / scale
        for run in runs:
            x = x_ref[rows, run].astype(jnp.float32) * inverse
            step, at = divmod(run.start, length)
            width = run.stop - run.start
            codes_ref[step, rows, at : at + width] = held(nearest(x, rounding.format))


def _peak(parts: list[Array]) -> Float[Array, "rows 1"]:
    """`numerics.peak` of parts that lie side by side, all but the last of one width."""
    ends = []
    whole = [p for p in parts if p.shape == parts[0].shape]
    for run in (whole, parts[len(whole) :]):
        if not run:
            continue
        high = low = run[0].astype(jnp.float32)
        lost = _lost(high)
        for part in run[1:]:
            x = part.astype(jnp.float32)
            high, low = jnp.maximum(high, x), jnp.minimum(low, x)
            lost = jnp.maximum(lost, _lost(x))
        peak = jnp.maximum(high.max(axis=1, keepdims=True), -low.min(axis=1, keepdims=True))
        ends.append(jnp.where(lost.max(axis=1, keepdims=True) > 0, jnp.nan, peak))
    if len(ends) == 1:
        return ends[0]
    lost = jnp.isnan(ends[0]) | jnp.isnan(ends[1])
    return jnp.where(lost, jnp.nan, jnp.maximum(ends[0], ends[1]))


def _lost(x: Array) -> Array:
    # Maxima of the vector unit need not keep a NaN.
    return jnp.where(jnp.isnan(x), jnp.ones_like(x), jnp.zeros_like(x))


def _scale(peak: Float[Array, "rows 1"], factor: float) -> Float[Array, "rows 1"]:
    """What `quantize_array` stores of a tile's peak, in float32."""
    scale = jnp.where(peak == 0, jnp.ones_like(peak), peak * np.float32(factor))
    scale = jnp.clip(scale, np.float32(_SMALLEST), np.float32(1 / TINY))
    return jnp.where(jnp.isnan(peak), jnp.nan, scale)


def nearest(x: Float[Array, "*dims"], format: Format) -> Float[Array, "*dims"]:
    """What the code of `format` nearest to each value stands for, in float32; see `encode`.

    Of floats, by adding what pushes all that is to be rounded off out of the mantissa: casts to
    8-bit floats are long programs on generations that do not have them.
    """
    x = jnp.clip(x, np.float32(format.lowest), np.float32(format.highest))
    if format.integer:
        return jnp.where(jnp.isnan(x), jnp.zeros_like(x), jnp.round(x))
    assert format.mantissa is not None
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = jnp.maximum(
        bits & np.int32(0x7F800000), np.int32((127 + format.least_exponent) << 23)
    )
    # 1.5 * 2^(exponent + 23 - mantissa): the last bit of that and a value is a code's last bit.
    shift = exponent + np.int32(((23 - format.mantissa) << 23) + (1 << 22))
    by = lax.bitcast_convert_type(shift, jnp.float32)
    return jnp.where(jnp.isnan(x), x, (x + by) - by)
