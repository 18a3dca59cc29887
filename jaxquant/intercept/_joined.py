"""Weights that a model puts together before it uses them: fused projections, stacks of layers.

`concatenate` and `stack` move no code. A `Joined` keeps its parts, and follows the operations that
look at the joined array differently. A product with it is one product for each part, each a site
of its own: their results are joined where the axis is kept or batched, and summed in float32 where
it is contracted.

Activations are rounded as they would be for one weight of the whole shape: over full rows, of which
each product takes its slice of codes, with the scales of the whole row.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ..ops import quantize_activation
from ..qarray import dequantize, QArray, Scheme, slice_axis
from ..qarray._reshape import matching_axes
from ..qarray._sharding import shards_of
from . import _views
from ._explicit import explicit_sharding, typed, typed_like
from ._views import VIEWS
from ._weight import is_weight, Joined, Position, Weight


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sliced:
    """Activations of one part of a contracted or batched axis, before they are cut."""

    whole: Any
    axis: int
    start: int
    limit: int

    def cut(self, whole: Any) -> Any:
        if isinstance(whole, QArray):
            return slice_axis(whole, self.axis, self.start, self.limit)
        return lax.slice_in_dim(whole, self.start, self.limit, axis=self.axis)


def rounded(x: Any, scheme: Scheme, **roles: Any) -> QArray:
    """`quantize_activation`, where a `Sliced` is rounded as a whole and cut afterwards.

    **Raises:** `ValueError` where that would cut tiles.
    """
    if isinstance(x, Sliced):
        return x.cut(rounded(x.whole, scheme, **roles))
    return typed_like(lambda x: quantize_activation(x, scheme, **roles), plain(x))


def plain(value: Any) -> Any:
    """The array that a value stands for."""
    if isinstance(value, Joined):
        return lax.concatenate([plain(part) for part in value.parts], value.axis)
    if isinstance(value, Sliced):
        return value.cut(plain(value.whole))
    if isinstance(value, Weight):
        value = value.value
    if isinstance(value, np.ndarray):
        # Called outside of `jit`, a jaxpr's arguments and constants may be NumPy's.
        return jnp.asarray(value)
    if isinstance(value, QArray):
        return typed(dequantize, explicit_sharding(value), value)
    return value


def join(eqn: Any, operands: Sequence[Any]) -> Joined | Weight | Array:
    """`concatenate` or `stack` of weights, and arrays beside them."""
    if eqn.primitive.name == "stack":
        axis = eqn.params["axis"]
        operands = [_expanded(x, axis) for x in operands]
    else:
        axis = eqn.params["dimension"]
    return _together([x for x in operands if x.shape[axis]] or list(operands), axis)


def _together(parts: Sequence[Any], axis: int) -> Any:
    flat: list[Any] = []
    for part in parts:
        flat += part.parts if isinstance(part, Joined) and part.axis == axis else [part]
    if len(flat) == 1:
        return flat[0]
    if not any(map(is_weight, flat)):
        return lax.concatenate(flat, axis)
    return Joined(parts=tuple(flat), axis=axis)


def _expanded(x: Any, axis: int) -> Any:
    if isinstance(x, Joined):
        parts = tuple(_expanded(part, axis) for part in x.parts)
        return Joined(parts=parts, axis=x.axis + (axis <= x.axis))
    return _views.expanded(x, axis) if is_weight(x) else lax.expand_dims(x, (axis,))


def _sliced(x: Any, starts: Sequence[int], limits: Sequence[int]) -> Any:
    if isinstance(x, Weight):
        return _views.sliced(x, starts, limits)
    if not isinstance(x, Joined):
        return lax.slice(x, starts, limits)
    pieces = []
    for part, begin, size in zip(x.parts, x.starts, x.sizes, strict=True):
        lower, upper = list(starts), list(limits)
        lower[x.axis] = max(starts[x.axis] - begin, 0)
        upper[x.axis] = min(limits[x.axis] - begin, size)
        if lower[x.axis] < upper[x.axis]:
            pieces.append(_sliced(part, lower, upper))
    if not pieces:
        raise ValueError("the slice of parameters put together is empty")
    return _together(pieces, x.axis)


def _squeezed(x: Any, drop: tuple[int, ...]) -> Any:
    if isinstance(x, Weight):
        return _views.squeezed(x, drop)
    if not isinstance(x, Joined):
        return lax.squeeze(x, drop)
    parts = tuple(_squeezed(part, drop) for part in x.parts)
    return Joined(parts=parts, axis=x.axis - sum(d < x.axis for d in drop))


def splits(eqn: Any, joined: Joined) -> list[Any]:
    """`split` and `unstack`.

    **Raises:** `ValueError` where tiles would be cut.
    """
    parts = [_sliced(joined, *cut) for cut in _views.cuts(eqn, joined.shape)]
    if eqn.primitive.name == "split":
        return parts
    return [_squeezed(part, (eqn.params["axis"],)) for part in parts]


def follow(eqn: Any, joined: Joined, *rest: Any) -> Any:
    """The joined array as a view leaves it, or `None` where the operation is more than a view.

    **Raises:** `ValueError` where parts would be mixed, or their tiles cut.
    """
    name, params, axis, shape = eqn.primitive.name, eqn.params, joined.axis, joined.shape
    moved, changes = axis, [{} for _ in joined.parts]
    match name:
        case "slice":
            strides = params["strides"]
            if strides is not None and any(s != 1 for s in strides):
                return None
            return _sliced(joined, params["start_indices"], params["limit_indices"])
        case "sharding_constraint" | "reshard":
            key = "sharding" if name == "sharding_constraint" else "dst_sharding"
            changes = [{key: _fitting(joined, params[key])} for _ in joined.parts]
        case "transpose":
            moved = tuple(params["permutation"]).index(axis)
        case "squeeze" | "reduce_sum":
            drop = params["dimensions" if name == "squeeze" else "axes"]
            drop = tuple(d % joined.ndim for d in drop)
            if axis in drop:
                return None
            moved = axis - sum(d < axis for d in drop)
        case "broadcast_in_dim":
            moved = tuple(params["broadcast_dimensions"])[axis]
            changes = [{"shape": _replaced(params["shape"], moved, size)} for size in joined.sizes]
        case "dynamic_slice":
            if params["slice_sizes"][axis] != shape[axis]:
                return None
            changes = [
                {"slice_sizes": _replaced(params["slice_sizes"], axis, size)}
                for size in joined.sizes
            ]
        case "reshape":
            if params.get("dimensions") is not None:
                return None
            moved, sizes = _reshaped(joined, tuple(params["new_sizes"]))
            changes = [{"new_sizes": _replaced(params["new_sizes"], moved, size)} for size in sizes]
    parts = []
    for part, change in zip(joined.parts, changes, strict=True):
        own = eqn.replace(params={**params, **change})
        if isinstance(part, Joined):
            part = follow(own, part, *rest)
        elif isinstance(part, Weight):
            part = VIEWS[name](own, part, *rest)
        else:
            part = eqn.primitive.bind(part, *rest, **own.params)
        if part is None:
            return None
        parts.append(part)
    return Joined(parts=tuple(parts), axis=moved)


def _replaced(sizes: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    return (*sizes[:axis], size, *sizes[axis + 1 :])


def _reshaped(joined: Joined, shape: tuple[int, ...]) -> tuple[int, list[int]]:
    """Where the joined axis is after a reshape, and how long each part is there.

    The elements of one part must stay neighbours: the joined axis is the outermost of those that
    are merged or split with it.

    **Raises:** `ValueError` otherwise.
    """
    for old, new in matching_axes(joined.shape, shape):
        if joined.axis not in old:
            continue
        outer = [a for a in old if a < joined.axis and joined.shape[a] != 1]
        moved = next((a for a in new if shape[a] != 1), None)
        if not outer and moved is not None:
            inner = math.prod(shape[a] for a in new if a > moved)
            each = math.prod(joined.shape[a] for a in old if a > joined.axis)
            if all(size * each % inner == 0 for size in joined.sizes):
                return moved, [size * each // inner for size in joined.sizes]
    raise ValueError(
        f"reshaping {joined.shape} to {shape} mixes the {len(joined.parts)} arrays that are joined "
        f"along axis {joined.axis}"
    )


def _fitting(joined: Joined, sharding: Any) -> Any:
    """A sharding for the parts: without its entry for the joined axis where it would cut a part."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    spec = [*sharding.spec, *(None,) * (joined.ndim - len(sharding.spec))]
    count = shards_of(spec[joined.axis], sharding.mesh)
    if any(size % count for size in joined.sizes):
        spec[joined.axis] = None
    return jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec(*spec), memory_kind=sharding.memory_kind
    )


def constrained(joined: Joined, sharding: Any, each: Any) -> Joined:
    """`each(part, sharding)` for the parts; an axis is replicated where shards would cut them."""
    fitting = _fitting(joined, sharding)
    return dataclasses.replace(joined, parts=tuple(each(part, fitting) for part in joined.parts))


def product(ev: Any, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    """An equation that is a site, with a joined operand: a product for each part."""
    joined = [side for side, x in enumerate(operands) if isinstance(x, Joined)]
    if eqn.primitive.name != "dot_general":
        reason = f"{eqn.primitive.name} reads several parameters that were put together"
        return ev.opaque(eqn, operands, reason)
    if sum(map(is_weight, operands)) > 1:
        reason = "both sides of a product are parameters, and one was put together of several"
        return ev.opaque(eqn, operands, reason)
    (side,) = joined
    other, whole = 1 - side, operands[side]
    contracted, batch = eqn.params["dimension_numbers"]
    summed = whole.axis in contracted[side]
    theirs = dict(
        zip((*contracted[side], *batch[side]), (*contracted[other], *batch[other]), strict=True)
    ).get(whole.axis)
    out = eqn.outvars[0].aval
    narrow = jnp.finfo(out.dtype).bits < 32
    dtype = np.dtype(np.float32) if summed and narrow else out.dtype
    own = _typed(eqn, dtype)
    results = []
    for i, (part, start) in enumerate(zip(whole.parts, whole.starts, strict=True)):
        pair: list[Any] = [part, part]
        size = part.shape[whole.axis]
        pair[other] = operands[other]
        if theirs is not None:
            pair[other] = Sliced(
                whole=operands[other], axis=theirs, start=start, limit=start + size
            )
        results += ev.site(own, pair, (*position, i))
    if summed:
        return [sum(results[1:], results[0]).astype(out.dtype)]
    return [lax.concatenate(results, _place(eqn, side, whole.axis))]


def _typed(eqn: Any, dtype: Any) -> Any:
    """The equation with another dtype of its result."""
    (out,) = eqn.outvars
    if out.aval.dtype == dtype:
        return eqn
    made = jax.make_jaxpr(
        lambda *xs: eqn.primitive.bind(*xs, **{**eqn.params, "preferred_element_type": dtype})
    )(*(jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars))
    return made.eqns[0]


def _place(eqn: Any, side: int, axis: int) -> int:
    """The axis of a product's result that comes from `axis` of one side."""
    contracted, batch = eqn.params["dimension_numbers"]
    if axis in batch[side]:
        return tuple(batch[side]).index(axis)
    place = len(batch[side])
    for i in range(side + 1):
        for a in range(len(eqn.invars[i].aval.shape)):
            if (i, a) == (side, axis):
                return place
            place += a not in contracted[i] and a not in batch[i]
    raise AssertionError
