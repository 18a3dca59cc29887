"""From an array to a QArray: the tile's range, the scale, the nearest codes."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

from ..numerics import encode, Format, peak, round_at_random
from ..numerics._scale import asymmetric_scale, offset_by, symmetric_scale, TINY, zero_point
from ._layout import CANONICAL
from ._qarray import QArray, scale_values, short_tiles, spread, tile_counts
from ._scheme import Scheme, tile_shape


def quantize_array(
    x: Float[Array, "..."],
    scheme: Scheme,
    *,
    contracted: tuple[int, ...] = (-1,),
    stack: tuple[int, ...] = (),
    key: Any = None,
) -> QArray:
    """Rounds `x` to the nearest values of `scheme`.

    `contracted` are the axes that the op sums over and `stack` those that merely hold several
    arrays side by side; both may count from the end. The other axes are kept. With a `key` (of
    `jax.random`) codes are rounded at random, so that their expectation is `x` where nothing is
    clipped; scales are not.

    Arithmetic is in float32; codes are chosen for the scale as it is stored, so that rounding a
    scale to 16 bits costs clipping of at most its own rounding error and nothing else.

    The bits do not depend on how this is compiled: values are multiplied by the reciprocal of
    their scale (XLA turns some of the divisions by a broadcast into that), and rounded before a
    zero point is added (a product and a sum may be contracted to one operation).

    **Raises:** `ValueError` where tiles do not fill an axis, `TypeError` if `x` is not floating.

    ```python
    scheme = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=64))
    q = jq.quantize_array(w, scheme, contracted=(0,))
    ```
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"Only floating-point arrays are quantized; got {x.dtype}. Cast it first, or name "
            "another array."
        )
    contracted = tuple(a % x.ndim for a in contracted)
    stack = tuple(a % x.ndim for a in stack)
    tile = tile_shape(x.shape, scheme.tile, contracted=contracted, stack=stack)
    values, offset = x.astype(jnp.float32), None
    if scheme.centered:
        shared = tuple(a for a in range(x.ndim) if a not in stack)
        # Divided first, so that the sum of large numbers does not overflow.
        part = values * np.float32(1 / math.prod(x.shape[a] for a in shared))
        offset = part.sum(axis=shared, keepdims=True)
        values = values - offset
    wanted, low = wanted_scale(values, scheme, tile)
    if isinstance(scheme.scale, Scheme):
        wanted = _holdable(wanted, scheme.scale, stack)
        scale: Any = quantize_array(wanted, scheme.scale, contracted=contracted, stack=stack)
    else:
        scale = stored_scale(wanted, scheme.scale)
    q = QArray(
        codes=None,
        scale=scale,
        zero_point=None,
        offset=offset,
        scheme=scheme,
        layout=CANONICAL,
        dtype=np.dtype(x.dtype),
        ragged=short_tiles(x.shape, tile),
    )
    return _with_codes(q, values, wanted if scheme.codes_first else scale_values(q), low, tile, key)


def quantize_with(
    x: Float[Array, "..."],
    scheme: Scheme,
    scale: Float[Array, "..."],
    zero_point: Shaped[Array, "..."] | None = None,
    *,
    contracted: tuple[int, ...] = (-1,),
    stack: tuple[int, ...] = (),
) -> QArray:
    """`quantize_array` with scales, and zero points, that are known: the range rule has no say.

    Both have one entry a tile, along axes of their own; zero points are codes.

    **Raises:** `ValueError` where they do not fit the tiles, or the scheme has other parts.
    """
    contracted = tuple(a % x.ndim for a in contracted)
    stack = tuple(a % x.ndim for a in stack)
    if isinstance(scheme.scale, Scheme) or scheme.centered:
        raise ValueError(
            f"Scales that are known are plain, one a tile, and those of {scheme} are not. Give a "
            "scheme whose scale is a format, and that is not centered."
        )
    if (zero_point is None) != (scheme.zero_point is None):
        raise ValueError(
            f"The scheme {scheme} has {'no ' if zero_point is not None else ''}zero points, and "
            f"{'some' if zero_point is not None else 'none'} were given."
        )
    tile = tile_shape(x.shape, scheme.tile, contracted=contracted, stack=stack)
    counts = tile_counts(x.shape, tile)
    for name, part in (("scales", scale), ("zero points", zero_point)):
        if part is not None and part.shape != counts:
            raise ValueError(
                f"Tiles of {tile} on an array of shape {x.shape} take {name} of shape {counts}, "
                f"not {part.shape}."
            )
    values = x.astype(jnp.float32)
    held = stored_scale(scale.astype(jnp.float32), scheme.scale)
    q = QArray(
        codes=None,
        scale=held,
        zero_point=zero_point,
        offset=None,
        scheme=scheme,
        layout=CANONICAL,
        dtype=np.dtype(x.dtype),
        ragged=short_tiles(x.shape, tile),
    )
    shifted = values * spread(1.0 / scale_values(q), tile, values.shape)
    if zero_point is None:
        codes = encode(shifted, scheme.values)
    else:
        codes = _shifted_codes(shifted, zero_point, scheme, tile, None)
    return dataclasses.replace(q, codes=codes)


def wanted_scale(
    values: Float[Array, "..."], scheme: Scheme, tile: tuple[int, ...]
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """The scale of each tile by the range rule, and where the range begins, if that matters."""
    if short_tiles(values.shape, tile):
        return _ragged_scale(values, scheme, tile)
    counts = tile_counts(values.shape, tile)
    tiles, within = _split(values, tile)
    # Among scales that are themselves held as codes, that of a tile of zeros is chosen later.
    empty = 0.0 if isinstance(scheme.scale, Scheme) else 1.0
    if scheme.zero_point is None:
        scale = symmetric_scale(tiles, within, scheme.range, scheme.values, empty)
        return scale.reshape(counts), None
    scale, low = asymmetric_scale(
        tiles, within, scheme.range, scheme.values, empty, real_zero=scheme.real_zero_point
    )
    return scale.reshape(counts), low.reshape(counts)


def _split(
    x: Float[Array, "..."], tile: tuple[int, ...]
) -> tuple[Float[Array, "..."], tuple[int, ...]]:
    """`x` with axes of its own for what lies within a tile, and which they are.

    Only axes that tiles cut are split: where axes of length 1 were made, XLA's CPU compiler copies
    the array.
    """
    shape: list[int] = []
    within: list[int] = []
    for n, t in zip(x.shape, tile, strict=True):
        shape += [n // t] if 1 < t < n else []
        if t > 1:
            within.append(len(shape))
        shape.append(n if t == 1 else t)
    return x.reshape(shape), tuple(within)


def _ragged_scale(
    values: Float[Array, "..."], scheme: Scheme, tile: tuple[int, ...]
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """Scales of whole tiles and of the short ones at an axis' end, computed apart and joined."""
    axis = short_tiles(values.shape, tile)[0][0] + values.ndim
    at = values.shape[axis] // tile[axis] * tile[axis]
    parts = []
    for start, limit in ((0, at), (at, values.shape[axis])):
        piece = lax.slice_in_dim(values, start, limit, axis=axis)
        own = tuple(min(t, limit - start) if a == axis else t for a, t in enumerate(tile))
        parts.append(wanted_scale(piece, scheme, own))
    scales, lows = zip(*parts, strict=True)
    low = None if lows[0] is None else jnp.concatenate(lows, axis=axis)
    return jnp.concatenate(scales, axis=axis), low


def _with_codes(
    q: QArray,
    values: Float[Array, "..."],
    scale: Float[Array, "..."],
    low: Float[Array, "..."] | None,
    tile: tuple[int, ...],
    key: Any,
) -> QArray:
    """`q` with the codes of `values`, for the given scales."""
    scheme = q.scheme
    # A tile whose scale is 0 (of zeros, or held as 0) stands for zeros: so do its codes.
    lost = scale == 0
    scale = jnp.where(lost, 1.0, scale)
    shifted = values * spread(jnp.where(lost, 0.0, 1.0 / scale), tile, values.shape)
    if low is None:
        codes = encode(shifted, scheme.values, key)
        return dataclasses.replace(q, codes=codes)
    assert scheme.zero_point is not None
    low = jnp.where(lost, 0.0, low)
    zero = stored_zero_point(zero_point(low, scale, scheme.values), scheme.zero_point)
    return dataclasses.replace(
        q, codes=_shifted_codes(shifted, zero, scheme, tile, key), zero_point=zero
    )


def _shifted_codes(
    shifted: Float[Array, "..."], zero: Array, scheme: Scheme, tile: tuple[int, ...], key: Any
) -> Array:
    """The codes of what is `shifted` gaps from 0, where 0 lies at `zero`."""
    by = spread(zero.astype(jnp.float32), tile, shifted.shape)
    if scheme.real_zero_point:
        return encode(offset_by(shifted, by), scheme.values, key)
    shifted = jnp.round(shifted) if key is None else round_at_random(shifted, key)
    return encode(shifted + by, scheme.values)


def stored_zero_point(zero: Float[Array, "*tiles"], format: Format) -> Shaped[Array, "*tiles"]:
    """Zero points as they are stored: the nearest code, or the nearest float of `format`."""
    if format.integer:
        return encode(zero, format)
    info = ml_dtypes.finfo(format.storage)
    held = jnp.clip(zero, -format.highest, format.highest)
    return lax.reduce_precision(held, info.nexp, info.nmant).astype(format.storage)


def stored_scale(scale: Float[Array, "*tiles"], format: Format) -> Shaped[Array, "*tiles"]:
    """Scales as they are stored: finite, with a finite reciprocal, and never rounded to 0."""
    if format.power_of_two:
        return encode(scale, format)
    info = ml_dtypes.finfo(format.storage)
    # Where subnormal numbers are computed with, the least of them is the least scale.
    least = float(info.smallest_subnormal) if format.bits <= 8 else float(info.tiny)
    size = jnp.clip(jnp.abs(scale), least, min(format.highest, 1 / TINY))
    signed = jnp.where(scale < 0, -size, size)
    if format.bits <= 8:
        return encode(signed, format)
    # A cast there and back may be compiled away; this rounding may not.
    return lax.reduce_precision(signed, info.nexp, info.nmant).astype(format.storage)


def _holdable(wanted: Float[Array, "..."], scheme: Scheme, stack: tuple[int, ...]) -> Any:
    """Scales as `scheme` can hold them beside each other: finite, and none of them 0.

    A scale that is rounded to 0 would lose its tile; that of the smallest code keeps what can be
    kept of it. Tiles of zeros, for which any scale will do, take the largest of their tensor, and
    so change nothing for the others; but where the mean is taken off they count as 0 in it, as
    they do in bitsandbytes.
    """
    axes = tuple(a for a in range(wanted.ndim) if a not in stack)
    size = jnp.minimum(jnp.abs(wanted), 1 / TINY)
    if scheme.centered:
        return jnp.where(wanted < 0, -size, size)
    highest = peak(size, axes)
    size = jnp.where(size == 0, jnp.where(highest == 0, 1.0, highest), size)
    if scheme.values.mantissa is not None:
        least = 2.0 ** (scheme.values.least_exponent - scheme.values.mantissa)
        size = jnp.maximum(size, highest * np.float32(least / scheme.values.highest))
    return jnp.where(wanted < 0, -size, size)


def abstract_qarray(
    shape: tuple[int, ...],
    dtype: Any,
    scheme: Scheme,
    *,
    contracted: tuple[int, ...],
    stack: tuple[int, ...] = (),
) -> QArray:
    """The shapes of `quantize_array` for an `x` of `shape`, without any `x`."""
    return jax.eval_shape(
        lambda x: quantize_array(x, scheme, contracted=contracted, stack=stack),
        jax.ShapeDtypeStruct(shape, dtype),
    )
