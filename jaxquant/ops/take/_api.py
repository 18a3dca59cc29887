"""Lookups that read only the codes and scales of the rows they need."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer

from ...numerics import decode, Format, packed_size, unpack
from ...qarray import check_qarray, QArray
from ...qarray._qarray import scale_values, spread
from ._reference import gather as reference_gather

FILL = lax.GatherScatterMode.FILL_OR_DROP
PROMISE = lax.GatherScatterMode.PROMISE_IN_BOUNDS


def take(
    q: QArray, indices: Integer[Array, "..."], *, mode: str | None = None
) -> Float[Array, "... features"]:
    """`jnp.take(array, indices, axis=0, mode=mode)` from the array that `q` stands for.

    In the mode `fill`, which is the default, negative indices count from the end, and rows that
    are out of range are NaN.

    **Raises:** `ValueError` for a mode that `jnp.take` does not have.
    """
    indices = _at_least_32_bits(indices)
    rows = jnp.asarray(q.shape[0], indices.dtype)
    match mode:
        case None | "fill":
            indices = jnp.where(indices < 0, indices + rows, indices)
            mode = "fill"
        case "wrap":
            indices = indices % rows
            mode = "promise_in_bounds"
        case "clip":
            pass
        case _:
            raise ValueError(f"take has the modes 'fill', 'clip' and 'wrap', not {mode!r}.")
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(indices.ndim, indices.ndim + q.ndim - 1)),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
    )
    return gather(
        q,
        indices[..., None],
        dimension_numbers=numbers,
        slice_sizes=(1, *q.shape[1:]),
        mode=mode,
    )


def refuses(q: QArray, slice_sizes: tuple[int, ...]) -> str | None:
    """Why the slices cannot be fetched before they are dequantized, or `None`."""
    for axis, (size, n, tile) in enumerate(zip(slice_sizes, q.shape, q.tile, strict=True)):
        if size not in (1, n) and tile not in (1, n):
            return f"slices of {size} along axis {axis} may begin inside one of its tiles of {tile}"
    if q.offset is not None:
        return "it is centered"
    if q.layout.packed is not None:
        last = q.layout.permutation(q.ndim)[-1]
        if slice_sizes[last] != q.shape[last]:
            return f"axis {last} is looked up by position, but its codes are packed"
    return None


def gather(
    q: QArray,
    indices: Integer[Array, "..."],
    *,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: tuple[int, ...],
    mode: Any = None,
    fill_value: Any = None,
    unique_indices: bool = False,
    indices_are_sorted: bool = False,
) -> Float[Array, "..."]:
    """`lax.gather` from the array that `q` stands for, in its dtype.

    Codes and scales of the slices are fetched, then multiplied: nothing as large as the array is
    made. Where slices may begin inside a tile, or inside a packed block, the whole array is
    dequantized first: the reference.
    """
    check_qarray(q)
    mode = lax.GatherScatterMode.from_any(mode)
    if refuses(q, slice_sizes) is not None:
        return reference_gather(
            q,
            indices,
            dimension_numbers=dimension_numbers,
            slice_sizes=slice_sizes,
            mode=mode,
            fill_value=fill_value,
            unique_indices=unique_indices,
            indices_are_sorted=indices_are_sorted,
        )
    indices = _at_least_32_bits(indices)
    axes = dimension_numbers.start_index_map
    last = _along(indices, [q.shape[a] - slice_sizes[a] for a in axes])
    # Slots outside the range are filled below, so what is fetched for them does not matter.
    starts = indices if mode == PROMISE else lax.clamp(jnp.zeros_like(indices), indices, last)
    fetch = _Fetch(q, starts, dimension_numbers, slice_sizes)
    values = fetch(q.codes, (1,) * q.ndim, q.scheme.values, q.layout.packed)
    if q.zero_point is not None:
        values = values - fetch(q.zero_point, q.tile)
    values = (values * fetch(scale_values(q), q.tile)).astype(q.dtype)
    if mode != FILL:
        return values
    inside = ((indices >= 0) & (indices <= last)).all(axis=-1)
    inside = lax.expand_dims(inside, dimension_numbers.offset_dims)
    fill = jnp.asarray(jnp.nan if fill_value is None else fill_value, q.dtype)
    return jnp.where(inside, values, fill)


class _Fetch:
    """Fetches the slices of one leaf of `q`, in logical order, spread over its tiles."""

    def __init__(self, q: QArray, starts: Array, numbers: Any, slice_sizes: tuple[int, ...]):
        self.q, self.starts, self.numbers, self.slice_sizes = q, starts, numbers, slice_sizes
        self.permutation = q.layout.permutation(q.ndim)
        hidden = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        self.kept = [a for a in self.permutation if a not in hidden]  # in stored order
        at = self.permutation.index
        pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
        batching = sorted((at(a), i) for a, i in pairs)
        self.stored_numbers = lax.GatherDimensionNumbers(
            offset_dims=numbers.offset_dims,
            collapsed_slice_dims=tuple(sorted(at(a) for a in numbers.collapsed_slice_dims)),
            start_index_map=tuple(at(a) for a in numbers.start_index_map),
            operand_batching_dims=tuple(a for a, _ in batching),
            start_indices_batching_dims=tuple(i for _, i in batching),
        )

    def __call__(
        self,
        part: Array,
        tile: tuple[int, ...],
        format: Format | None = None,
        packed: int | None = None,
    ) -> Float[Array, "..."]:
        starts, offsets = self.starts, self.numbers.offset_dims
        tiles = [tile[a] for a in self.numbers.start_index_map]
        if math.prod(tiles) != 1:
            starts = lax.div(starts, _along(starts, tiles))
        sizes = [-(-size // t) for size, t in zip(self.slice_sizes, tile, strict=True)]
        stored_sizes = [sizes[a] for a in self.permutation]
        if packed is not None:
            assert format is not None
            stored_sizes[-1] = packed_size(stored_sizes[-1], format)
        found = lax.gather(part, starts, self.stored_numbers, tuple(stored_sizes), mode=PROMISE)
        if packed is not None and format is not None:
            found = jnp.moveaxis(found, offsets[-1], -1)
            found = unpack(found, format, packed)
            found = jnp.moveaxis(found, -1, offsets[-1])
        order = list(range(found.ndim))
        for offset, axis in zip(offsets, sorted(self.kept), strict=True):
            order[offset] = offsets[self.kept.index(axis)]
        found = found.transpose(order)
        found = found.astype(jnp.float32) if format is None else decode(found, format, jnp.float32)
        wide, shape = [1] * found.ndim, list(found.shape)
        for offset, axis in zip(offsets, sorted(self.kept), strict=True):
            shape[offset] = self.slice_sizes[axis]
            wide[offset] = tile[axis] if sizes[axis] > 1 else self.slice_sizes[axis]
        return spread(found, tuple(wide), tuple(shape))


def _at_least_32_bits(indices: Integer[Array, "..."]) -> Integer[Array, "..."]:
    """The last position of a long axis may not fit the dtype of the indices."""
    return indices.astype(jnp.int32) if indices.dtype.itemsize < 4 else indices


def _along(indices: Array, numbers: list[int]) -> Array:
    """One number for each component of the index vectors, in the shape of `indices`."""
    return jnp.broadcast_to(jnp.asarray(np.array(numbers, indices.dtype)), indices.shape)
