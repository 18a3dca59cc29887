"""Lookups that read only the codes and scales of the rows they need."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ...qarray import check_qarray, Layout, QArray, relayout
from ...qarray._qarray import spread
from ._reference import gather as reference_gather

FILL = lax.GatherScatterMode.FILL_OR_DROP


def take(
    q: QArray, indices: Int[Array, "..."], *, mode: Any = "fill"
) -> Float[Array, "... features"]:
    """Rows of `q` (axis 0) at `indices`; out-of-range ones are NaN under the mode `fill`."""
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
        mode=lax.GatherScatterMode.from_any(mode),
    )


def refuses(q: QArray, slice_sizes: tuple[int, ...]) -> str | None:
    """Why the rows cannot be fetched before they are dequantized, or `None`."""
    for axis, (size, n, tile) in enumerate(zip(slice_sizes, q.shape, q.tile, strict=True)):
        if size != n and tile not in (1, n):
            return f"axis {axis} is looked up by position, but {tile} of its elements share a scale"
    if q.layout.packed is not None:
        last = q.layout.permutation(q.ndim)[-1]
        if slice_sizes[last] != q.shape[last]:
            return f"axis {last} is looked up by position, but its codes are packed"
    return None


def gather(
    q: QArray,
    indices: Int[Array, "..."],
    *,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: tuple[int, ...],
    mode: Any = None,
    fill_value: Any = None,
    **flags: bool,
) -> Float[Array, "..."]:
    """`lax.gather` from the array that `q` stands for, in its dtype.

    Codes and scales of the slices are fetched, then multiplied. Where positions along an axis
    share a scale in part, the whole array is dequantized first: the reference.
    """
    check_qarray(q)
    mode = lax.GatherScatterMode.from_any(mode)
    params = dict(dimension_numbers=dimension_numbers, mode=mode, **flags)
    if refuses(q, slice_sizes) is not None:
        return reference_gather(
            q, indices, slice_sizes=slice_sizes, fill_value=fill_value, **params
        )
    if q.layout.order is not None or q.layout.packed is not None:
        q = relayout(q, Layout())
    # Slots outside the range are filled below, so what is fetched for them does not matter.
    inside = dict(params, mode=lax.GatherScatterMode.CLIP if mode == FILL else mode)

    def fetch(part: Array, tile: tuple[int, ...]) -> Array:
        """The slices of `part`, spread back over the tiles of the axes that are taken whole."""
        sizes = tuple(
            n if size == whole else 1
            for n, size, whole in zip(part.shape, slice_sizes, q.shape, strict=True)
        )
        looked_up = [a for a, n in enumerate(q.shape) if slice_sizes[a] != n]
        shared = {a: q.shape[a] for a in looked_up if part.shape[a] == 1}
        full = tuple(q.shape[a] if a in shared else n for a, n in enumerate(part.shape))
        part = jnp.broadcast_to(part, full)
        sizes = tuple(slice_sizes[a] if a in looked_up else n for a, n in enumerate(sizes))
        found = lax.gather(part, indices, slice_sizes=sizes, **inside)
        kept = [a for a in range(q.ndim) if a not in dimension_numbers.collapsed_slice_dims]
        kept = [a for a in kept if a not in dimension_numbers.operand_batching_dims]
        wide = [1] * found.ndim
        for axis, offset in zip(kept, dimension_numbers.offset_dims, strict=True):
            if axis not in looked_up:
                wide[offset] = tile[axis]
        return spread(found, tuple(wide))

    values = fetch(q.codes, (1,) * q.ndim).astype(jnp.float32)
    if q.zero_point is not None:
        values = values - fetch(q.zero_point, q.tile).astype(jnp.float32)
    values = (values * fetch(q.scale, q.tile).astype(jnp.float32)).astype(q.dtype)
    if mode != FILL:
        return values
    present = lax.gather(
        jnp.ones(q.shape, bool), indices, slice_sizes=slice_sizes, fill_value=False, **params
    )
    return jnp.where(
        present, values, jnp.asarray(jnp.nan if fill_value is None else fill_value, q.dtype)
    )
