"""Moving the axes of a QArray, where tiles stay whole; a clear refusal where they would not."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax import lax

from ._layout import inverse, Layout, order_of
from ._qarray import QArray, short_tiles, spread, tile_counts, with_plain_scale
from ._relayout import relayout


def astype(q: QArray, dtype: Any) -> QArray:
    """The same codes, standing for an array of another floating dtype."""
    return dataclasses.replace(q, dtype=np.dtype(dtype))


def transpose(q: QArray, permutation: tuple[int, ...]) -> QArray:
    """Permutes the logical axes. Nothing moves in memory: the layout remembers the order."""
    moved = inverse(tuple(permutation))
    stored = tuple(moved[a] for a in q.layout.permutation(q.ndim))
    layout = dataclasses.replace(q.layout, order=order_of(stored))
    return dataclasses.replace(q, layout=layout)


def slice_axis(q: QArray, axis: int, start: int, limit: int) -> QArray:
    """Elements `start` to `limit` of a logical axis.

    **Raises:** `ValueError` where that would cut a packed block, or a tile otherwise than at the
    end of an axis whose last tile may be short.
    """
    stored = q.layout.permutation(q.ndim).index(axis)
    size, tile = q.stored_shape[stored], q.stored_tile[stored]
    if (start, limit) == (0, size):
        return q
    bits = 8
    if q.layout.packed is not None and stored == q.ndim - 1:
        if start % q.layout.packed or limit % q.layout.packed:
            raise ValueError(
                f"Slice [{start}:{limit}] of axis {axis} cuts packed blocks of {q.layout.packed} "
                "codes. Slice at multiples of that, or unpack first (`relayout`)."
            )
        bits = q.scheme.values.bits
    whole = tile == size
    if not whole and (start % tile or (limit % tile and limit != size)):
        raise ValueError(
            f"Slice [{start}:{limit}] of axis {axis} cuts tiles of {tile}. Slice at multiples of "
            f"{tile}, use `retile` for finer tiles, or `dequantize` first."
        )
    codes = lax.slice_in_dim(q.codes, start * bits // 8, limit * bits // 8, axis=stored)
    short = dict(q.ragged)
    if limit - start < tile or (limit - start) % tile == 0:
        short.pop(stored - q.ndim, None)
    if whole:
        return dataclasses.replace(q, codes=codes, ragged=tuple(short.items()))
    q = _sliceable(q, stored)

    def cut(part: Any) -> Any:
        return lax.slice_in_dim(part, start // tile, -(-limit // tile), axis=stored)

    scale = jax.tree.map(cut, q.scale)
    zero = None if q.zero_point is None else cut(q.zero_point)
    offset = q.offset
    if offset is not None and offset.shape[stored] != 1:
        offset = cut(offset)
    return dataclasses.replace(
        q, codes=codes, scale=scale, zero_point=zero, offset=offset, ragged=tuple(short.items())
    )


def _sliceable(q: QArray, stored: int) -> QArray:
    """`q` with every leaf of its scales as long along a stored axis as the scales are."""
    lengths = {part.shape[stored] for part in jax.tree.leaves(q.scale)}
    return q if len(lengths) == 1 else with_plain_scale(q)


def dynamic_index(q: QArray, axis: int, start: Any, size: int) -> QArray:
    """`size` elements of a logical axis from a traced `start`, which is clamped as in `lax`.

    **Raises:** `ValueError` unless every element of that axis has its own tile, and it is not the
    packed one.
    """
    stored = q.layout.permutation(q.ndim).index(axis)
    if size == q.stored_shape[stored]:
        return q
    packed_here = q.layout.packed is not None and stored == q.ndim - 1
    if q.stored_tile[stored] != 1 or packed_here:
        raise ValueError(
            f"A slice at a traced position needs tiles of 1 along axis {axis}, which has tiles of "
            f"{q.stored_tile[stored]}{' and is packed' if packed_here else ''}."
        )
    q = _sliceable(q, stored)

    def cut(part: Any) -> Any:
        # Only an offset is 1 long where there is a tile for each element: it is for all of them.
        if part.shape[stored] == 1:
            return part
        return lax.dynamic_slice_in_dim(part, start, size, stored)

    return jax.tree.map(cut, q)


def reshape(q: QArray, shape: tuple[int, ...]) -> QArray:
    """Merges and splits neighbouring logical axes.

    **Raises:** `ValueError` where tiles would not stay boxes of neighbours.
    """
    shape = tuple(shape)
    if shape == q.shape:
        return q
    if math.prod(shape) != q.size or min(shape, default=1) < 0:
        raise ValueError(
            f"{q.size} elements of shape {q.shape} cannot take the shape {shape}, which has "
            f"{math.prod(shape)}. Give every length; -1 is not taken."
        )
    if q.layout.order is not None or q.layout.packed is not None:
        q = relayout(q, Layout(wide=q.layout.wide))
    tile = reshaped_tile(q.shape, q.tile, shape)
    scales = tile_counts(shape, tile)
    if q.offset is not None and math.prod(q.offset.shape) != 1:
        raise ValueError("A centered QArray with stack axes is not reshaped; dequantize it first.")
    q = with_plain_scale(q)
    zero = None if q.zero_point is None else q.zero_point.reshape(scales)
    return dataclasses.replace(
        q,
        codes=q.codes.reshape(shape),
        scale=q.scale.reshape(scales),
        zero_point=zero,
        offset=None if q.offset is None else q.offset.reshape((1,) * len(shape)),
        ragged=short_tiles(shape, tile),
    )


def reshaped_tile(
    old: tuple[int, ...], tile: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...]:
    """The tile of each axis after reshaping `old` to `new`.

    **Raises:** `ValueError` where a tile would not stay a box.
    """
    result: list[int] = []
    for old_axes, new_axes in matching_axes(old, new):
        if tuple(old[a] for a in old_axes) == tuple(new[a] for a in new_axes):
            result += [tile[a] for a in old_axes]
            continue
        flat = flat_tile(tuple(old[a] for a in old_axes), tuple(tile[a] for a in old_axes))
        left = flat
        sizes: list[int] = []
        for axis in reversed(new_axes):
            if left is None:
                break
            step = math.gcd(left, new[axis])
            if step not in (left, new[axis]):
                left = None
                break
            sizes.insert(0, step)
            left //= step
        if left != 1:
            raise ValueError(
                f"Reshaping {old} to {new} would break tiles of {tile} apart. Reshape the array "
                "before it is quantized, or dequantize it first."
            )
        result += sizes
    return tuple(result)


def flat_tile(shape: tuple[int, ...], tile: tuple[int, ...]) -> int | None:
    """How many neighbours of the flattened axes share a scale; `None` if they are not a run."""
    if any(n % t for n, t in zip(shape, tile, strict=True)):
        return None
    seen_partial = False
    for n, t in zip(reversed(shape), reversed(tile), strict=True):
        if seen_partial and t != 1:
            return None
        seen_partial |= t != n
    return math.prod(tile)


def matching_axes(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of runs of axes of `old` and `new` that hold the same elements; products agree."""
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        a = b = 1
        if i < len(old):
            a, i = old[i], i + 1
        if j < len(new):
            b, j = new[j], j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        pairs.append((tuple(range(start_i, i)), tuple(range(start_j, j))))
    return pairs


def slice_qarray(q: QArray, index: Any) -> QArray:
    """`q[index]` for integers, slices of step 1 and `...`.

    **Raises:** `ValueError` where a tile would be cut, `TypeError` for other kinds of index.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [slice(None)] * (q.ndim - len(entries) + 1)
    entries += [slice(None)] * (q.ndim - len(entries))
    if len(entries) > q.ndim:
        raise IndexError(f"{len(entries)} indices for a QArray of {q.ndim} axes.")
    dropped = []
    for axis, entry in enumerate(entries):
        if isinstance(entry, slice):
            start, limit, step = entry.indices(q.shape[axis])
            if step != 1:
                raise ValueError(f"A QArray is sliced with step 1, not {step}.")
            q = slice_axis(q, axis, start, limit)
        elif isinstance(entry, (int, np.integer)):
            at = range(q.shape[axis])[int(entry)]
            q = slice_axis(q, axis, at, at + 1)
            dropped.append(axis)
        elif isinstance(entry, jax.Array) and entry.ndim == 0:
            q = dynamic_index(q, axis, entry, 1)
            dropped.append(axis)
        else:
            raise TypeError(
                f"A QArray is indexed by integers, slices and ..., not {type(entry).__name__}. "
                "Use `jaxquant.take` to look up rows."
            )
    return squeeze(q, tuple(dropped)) if dropped else q


def squeeze(q: QArray, axes: tuple[int, ...]) -> QArray:
    """Drops logical axes of length 1, wherever they are stored."""
    if not axes:
        return q
    permutation = q.layout.permutation(q.ndim)
    stored = tuple(i for i, a in enumerate(permutation) if a in axes)
    if q.layout.packed is not None and q.ndim - 1 in stored:
        raise ValueError("The packed axis cannot be dropped. Unpack first (`relayout`).")
    left = [a for a in range(q.ndim) if a not in axes]
    order = tuple(left.index(a) for a in permutation if a not in axes)
    layout = dataclasses.replace(q.layout, order=order_of(order))
    gone = [i - q.ndim for i in stored]
    q = jax.tree.map(lambda part: part.reshape(_without(part.shape, stored)), q)
    scale = q.scale
    if isinstance(scale, QArray):
        scale = dataclasses.replace(scale, ragged=_moved(scale.ragged, gone))
    return dataclasses.replace(q, scale=scale, layout=layout, ragged=_moved(q.ragged, gone))


def _moved(ragged: tuple[tuple[int, int], ...], gone: list[int]) -> tuple[tuple[int, int], ...]:
    """Axes counted from the end, once those in `gone` are dropped."""
    return tuple((axis + sum(axis < g for g in gone), tile) for axis, tile in ragged)


def expand_dims(q: QArray, axes: tuple[int, ...]) -> QArray:
    """Adds logical axes of length 1 at positions `axes` of the result; stored in front."""
    ndim = q.ndim + len(axes)
    kept = [a for a in range(ndim) if a not in axes]
    stored = tuple(axes) + tuple(kept[a] for a in q.layout.permutation(q.ndim))
    layout = dataclasses.replace(q.layout, order=order_of(stored))
    ones = (1,) * len(axes)
    q = jax.tree.map(lambda part: part.reshape(ones + part.shape), q)
    return dataclasses.replace(q, layout=layout)


def _without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(shape) if i not in axes)


def retile(q: QArray, axis: int, tile: int) -> QArray:
    """The same values with finer tiles along a logical axis: scales are repeated.

    **Raises:** `ValueError` unless `tile` divides the present one, or that is the whole axis.
    """
    stored = q.layout.permutation(q.ndim).index(axis)
    now, size = q.stored_tile[stored], q.stored_shape[stored]
    if now % tile and now != size:
        raise ValueError(f"Tiles of {now} along axis {axis} cannot be cut into tiles of {tile}.")
    if now == tile:
        return q
    q = with_plain_scale(q)
    times = tuple(-(-now // tile) if i == stored else 1 for i in range(q.ndim))

    def repeated(part: Any) -> Any:
        shape = tuple(-(-size // tile) if i == stored else n for i, n in enumerate(part.shape))
        return spread(part, times, shape)

    zero = None if q.zero_point is None else repeated(q.zero_point)
    short = {**dict(q.ragged), stored - q.ndim: tile}
    if size % tile == 0:
        short.pop(stored - q.ndim)
    return dataclasses.replace(
        q, scale=repeated(q.scale), zero_point=zero, ragged=tuple(short.items())
    )
