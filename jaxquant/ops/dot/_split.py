"""Scales moved past the sum.

A contracted axis whose tiles are `t` wide is split in place into (groups, t). Within a group both
scales are constant, so `sum_k (a_k s_a) (b_k s_b) = s_a s_b sum_k a_k b_k`: the codes are summed
first, in integers where both are integers, and scaled once a group.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ...qarray import QArray, retile
from ...qarray._layout import inverse
from .._factors import common_tile, kept_scale, stored_factors
from ._call import DotCall

# The narrowest group whose partial sums are worth keeping apart: with narrower ones the partial
# sums of a 128-wide matrix unit's pass are as large as the weights themselves.
NARROWEST_GROUP = 128
# The most that the sums of all groups may take beside each other; what is more is summed group by
# group. Those of one product of 16 rows by 4096x14336, in groups of 128, are 29 MB.
MOST_SUMS_BYTES = 1 << 27


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One operand with its contracted axes split into groups.

    `factors` are its values in stored order, each contracted axis of several tiles replaced by
    (groups, tile). `axes[a]` is where logical axis `a` went (for one that was replaced: its group
    axis; the tile axis follows it). `scale` has the axes of `factors` with tile axes dropped, or is
    `None`.
    """

    factors: Array
    axes: tuple[int, ...]
    scale: Array | None
    scale_axes: tuple[int, ...]


def contracted_tiles(call: DotCall) -> tuple[int, ...]:
    """For each contracted pair of axes, the widest tile within which both scales are constant.

    Where the last tile of an axis is short, the tile need not divide the axis.
    """
    tiles = []
    for left, right in zip(*call.contracted, strict=True):
        n = call.lhs.shape[left]
        sides = ((call.lhs, left), (call.rhs, right))
        tiles.append(common_tile(n, *(x.tile[a] for x, a in sides if isinstance(x, QArray))))
    return tuple(tiles)


def narrow(call: DotCall) -> bool:
    """Whether partial sums of each group would be as large as what they are sums of."""
    sizes = [call.lhs.shape[a] for a in call.contracted[0]]
    tiles = zip(contracted_tiles(call), sizes, strict=True)
    return any(t != n and t < NARROWEST_GROUP for t, n in tiles)


def split(operand: Any, contracted: tuple[int, ...], tiles: tuple[int, ...], dtype: Any) -> Split:
    """Codes of `operand` as `dtype` with zero points taken off, and its scales, ready to sum."""
    quantized = isinstance(operand, QArray)
    if quantized:
        for axis, tile in zip(contracted, tiles, strict=True):
            operand = retile(operand, axis, tile)
        logical = operand.layout.permutation(operand.ndim)
        values = stored_factors(operand, dtype)
    else:
        logical = tuple(range(operand.ndim))
        values = operand.astype(dtype)
    shape: list[int] = []
    position: dict[int, int] = {}
    padding = [(0, 0)] * len(logical)
    for i, (n, axis) in enumerate(zip(values.shape, logical, strict=True)):
        position[axis] = len(shape)
        tile = tiles[contracted.index(axis)] if axis in contracted else n
        # A short last tile is filled up with zeros, which add nothing to its sum.
        padding[i] = (0, -n % tile)
        n += -n % tile
        # A batch axis of length 1 would make XLA move the weight's axes about.
        shape += [n] if tile == n else [n // tile, tile]
    axes = tuple(position[a] for a in range(len(logical)))
    if any(after for _, after in padding):
        values = jnp.pad(values, padding)
    if not quantized:
        return Split(factors=values.reshape(shape), axes=axes, scale=None, scale_axes=())
    # Scales of kept axes may tile them too (per tensor: one in all; blocks: several).
    scale = kept_scale(operand, [a in contracted for a in logical])
    return Split(factors=values.reshape(shape), axes=axes, scale=scale, scale_axes=inverse(logical))


def scaled_sums(call: DotCall, dtypes: tuple[Any, Any], sum_dtype: Any) -> Array:
    """The product of `call`: sums of codes in `sum_dtype`, scaled once a group in float32."""
    tiles = contracted_tiles(call)
    left, right = call.contracted
    sides = (
        split(call.lhs, left, tiles, dtypes[0]),
        split(call.rhs, right, tiles, dtypes[1]),
    )
    sizes = [call.lhs.shape[a] for a in call.contracted[0]]
    grouped = tuple(i for i, (n, t) in enumerate(zip(sizes, tiles, strict=True)) if n != t)
    if len(grouped) == 1 and _sums_bytes(call, sides, grouped[0]) > MOST_SUMS_BYTES:
        return _one_by_one(call, sides, grouped[0], sum_dtype).astype(call.out_dtype)
    scaled = _scaled(call, sides, grouped, sum_dtype)
    batch = len(call.batch[0])
    y = scaled.sum(axis=tuple(range(batch, batch + len(grouped)))) if grouped else scaled
    return y.astype(call.out_dtype)


def _scaled(
    call: DotCall, sides: tuple[Split, Split], grouped: tuple[int, ...], sum_dtype: Any
) -> Array:
    """Sums of groups, in float32 and scaled: axes are batch, groups, free of lhs, free of rhs."""
    scaled = group_sums(call, sides, grouped, sum_dtype).astype(jnp.float32)
    for side in (0, 1):
        scale = broadcast_scale(call, sides[side], side, grouped)
        if scale is not None:
            scaled = scaled * scale
    return scaled


def _sums_bytes(call: DotCall, sides: tuple[Split, Split], pair: int) -> int:
    """Bytes of the sums of all groups of a contracted pair of axes, beside each other."""
    groups = sides[0].factors.shape[sides[0].axes[call.contracted[0][pair]]]
    batch = math.prod(call.lhs.shape[a] for a in call.batch[0])
    free = (math.prod(x.shape[a] for a in call.free(i)) for i, x in enumerate((call.lhs, call.rhs)))
    return 4 * groups * batch * math.prod(free)


def _one_by_one(call: DotCall, sides: tuple[Split, Split], pair: int, sum_dtype: Any) -> Array:
    """The scaled sums of groups, added one after the other: two of them are held at a time."""
    axes = [call.contracted[which][pair] for which in (0, 1)]
    groups = sides[0].factors.shape[sides[0].axes[axes[0]]]

    def add(at: Any, so_far: Array) -> Array:
        left, right = (_group(side, a, at) for side, a in zip(sides, axes, strict=True))
        return so_far + _scaled(call, (left, right), (), sum_dtype)

    return lax.fori_loop(1, groups, add, add(0, jnp.zeros((), jnp.float32)))


def _group(side: Split, axis: int, at: Any) -> Split:
    """Group `at` along a contracted axis that was split: the axis is then that of its tile."""
    place = side.axes[axis]
    factors = lax.dynamic_index_in_dim(side.factors, at, place, keepdims=False)
    axes = tuple(a - (a > place) for a in side.axes)
    scale = side.scale
    if scale is not None:
        scale = lax.dynamic_index_in_dim(scale, at, side.scale_axes[axis], keepdims=True)
    return Split(factors=factors, axes=axes, scale=scale, scale_axes=side.scale_axes)


def group_sums(
    call: DotCall, sides: tuple[Split, Split], grouped: tuple[int, ...], sum_dtype: Any
) -> Array:
    """Sums of products of codes: axes are batch, groups, free of lhs, free of rhs (all logical).

    `grouped` says which contracted pairs of axes have several tiles, each a group axis.
    """

    def axes_of(which: int) -> tuple[list[int], list[int]]:
        """Contracted and batch axes of one side's factors."""
        at, axes = sides[which].axes, call.contracted[which]
        summed = [at[a] + (i in grouped) for i, a in enumerate(axes)]
        return summed, [at[a] for a in (*call.batch[which], *(axes[i] for i in grouped))]

    (left, left_batch), (right, right_batch) = axes_of(0), axes_of(1)
    lhs, rhs = (side.factors for side in sides)
    if _fails_on_cpu(call, (lhs, rhs), left, (left_batch, right_batch)):
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    sums = lax.dot_general(
        lhs,
        rhs,
        ((left, right), (left_batch, right_batch)),
        precision=call.precision,
        preferred_element_type=sum_dtype,
    )
    # dot_general keeps free axes in stored order; ours are wanted in logical order.
    lead = len(left_batch)
    order = list(range(lead))
    at = lead
    for side in (0, 1):
        free = call.free(side)
        stored = sorted(free, key=lambda a: sides[side].axes[a])
        order += [at + stored.index(a) for a in free]
        at += len(free)
    return sums if order == list(range(len(order))) else sums.transpose(order)


def _fails_on_cpu(
    call: DotCall,
    factors: tuple[Array, Array],
    summed: list[int],
    batch: tuple[list[int], list[int]],
) -> bool:
    """Whether XLA's CPU compiler may lack this product, which it then has in float32.

    With jax 0.10.2 that is one of bfloat16, on the left stored as (batch, contracted, free), and
    with batch axes that are not first on the right: "Unsupported element type for DotThunk".
    """
    if call.platform != "cpu" or not batch[0] or factors[0].dtype != jnp.bfloat16:
        return False
    first = list(range(len(batch[0])))
    after = list(range(len(first), len(first) + len(summed)))
    return (sorted(batch[0]), sorted(summed)) == (first, after) and sorted(batch[1]) != first


def broadcast_scale(
    call: DotCall, side: Split, which: int, grouped: tuple[int, ...]
) -> Array | None:
    """Scales of one side, shaped to multiply `group_sums`."""
    if side.scale is None:
        return None
    free = call.free(which)
    wanted = call.batch[which] + call.contracted[which] + free
    scale = side.scale.transpose([side.scale_axes[a] for a in wanted])
    batch = len(call.batch[which])
    groups = tuple(scale.shape[batch + i] for i in grouped)
    kept = scale.shape[batch + len(call.contracted[which]) :]
    other = (1,) * len(call.free(1 - which))
    before, after = (other, ()) if which == 1 else ((), other)
    return scale.reshape(*scale.shape[:batch], *groups, *before, *kept, *after)
