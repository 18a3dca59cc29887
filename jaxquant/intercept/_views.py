"""Operations that only look at a parameter differently: provenance follows them.

Each takes the equation and the weight and returns the weight as the equation leaves it, or `None`
where the operation is more than a view. QArrays that refuse (tiles would break) raise `ValueError`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import qarray
from ..qarray import QArray
from ..qarray._reshape import expand_dims, matching_axes, squeeze
from ._states import cut_state
from ._weight import Joined, Weight


def _bound(eqn: Any, *rest: Any) -> Callable[[Any], Any]:
    """The equation on an array."""
    return lambda x: eqn.primitive.bind(x, *rest, **eqn.params)


def _transpose(eqn: Any, weight: Weight) -> Weight:
    return _permuted(weight, tuple(eqn.params["permutation"]), _bound(eqn))


def _permuted(
    weight: Weight, permutation: tuple[int, ...], on_array: Callable[[Any], Any]
) -> Weight:
    axes = tuple(weight.axes[a] for a in permutation)
    return weight.seen(axes, lambda q: qarray.transpose(q, permutation), on_array)


def _convert(eqn: Any, weight: Weight) -> Weight | None:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return weight.seen(weight.axes, lambda q: qarray.astype(q, dtype), _bound(eqn))


def _reshape(eqn: Any, weight: Weight) -> Weight | None:
    permutation = eqn.params.get("dimensions")
    if permutation is not None:
        # A batched convolution's: axes are permuted, then reshaped.
        weight = _permuted(weight, tuple(permutation), lambda x: jnp.transpose(x, permutation))
    shape = tuple(eqn.params["new_sizes"])
    axes: list[tuple[int, ...]] = []
    for old, new in matching_axes(weight.shape, shape):
        merged = tuple(stored for a in old for stored in weight.axes[a])
        axes += _share_out(merged, tuple(weight.shape[a] for a in old), old, weight, shape, new)
    own = {**eqn.params, "dimensions": None}
    return weight.seen(
        tuple(axes),
        lambda q: qarray.reshape(q, shape),
        lambda x: eqn.primitive.bind(x, **own),
    )


def _share_out(
    merged: tuple[int, ...],
    old_sizes: tuple[int, ...],
    old: tuple[int, ...],
    weight: Weight,
    shape: tuple[int, ...],
    new: tuple[int, ...],
) -> list[tuple[int, ...]]:
    """Which stored axes each new axis of one matching run holds."""
    real = [a for a in old if weight.shape[a] != 1]
    wide = [a for a in new if shape[a] != 1]
    if len(real) == len(wide):
        # Only axes of length 1 came or went; those that were the parameter's own keep their name
        # by joining a neighbour, so that none turns into a stack axis by a reshape.
        named = iter([weight.axes[a] for a in real])
        return [next(named) if shape[a] != 1 else () for a in new]
    return [merged if shape[a] != 1 else () for a in new]


def _squeeze(eqn: Any, weight: Weight) -> Weight:
    return squeezed(weight, tuple(d % weight.ndim for d in eqn.params["dimensions"]))


def _sum(eqn: Any, weight: Weight) -> Weight | None:
    """A sum over axes of length 1 drops them."""
    drop = tuple(eqn.params["axes"])
    return None if any(weight.shape[a] != 1 for a in drop) else squeezed(weight, drop)


def _broadcast(eqn: Any, weight: Weight) -> Weight | None:
    shape = tuple(eqn.params["shape"])
    where = tuple(eqn.params["broadcast_dimensions"])
    added = tuple(a for a in range(len(shape)) if a not in where)
    if any(shape[a] != 1 for a in added) or tuple(shape[a] for a in where) != weight.shape:
        return None
    axes = tuple(() if a in added else weight.axes[where.index(a)] for a in range(len(shape)))
    return weight.seen(axes, lambda q: expand_dims(q, added), _bound(eqn))


def _slice(eqn: Any, weight: Weight) -> Weight | None:
    strides = eqn.params["strides"]
    if strides is not None and any(s != 1 for s in strides):
        return None
    return sliced(weight, eqn.params["start_indices"], eqn.params["limit_indices"])


def sliced(weight: Weight, starts: Sequence[int], limits: Sequence[int]) -> Weight:
    """Elements `starts` to `limits` of each axis."""

    def cut(q: QArray) -> QArray:
        for axis, (start, limit) in enumerate(zip(starts, limits, strict=True)):
            q = qarray.slice_axis(q, axis, start, limit)
        return q

    for axis, (start, limit) in enumerate(zip(starts, limits, strict=True)):
        weight = cut_state(weight, axis, start, limit - start)
    return weight.seen(weight.axes, cut, lambda x: lax.slice(x, starts, limits))


def squeezed(weight: Weight, drop: tuple[int, ...]) -> Weight:
    """Without axes of length 1."""
    axes = tuple(s for a, s in enumerate(weight.axes) if a not in drop)
    return weight.seen(axes, lambda q: squeeze(q, drop), lambda x: lax.squeeze(x, drop))


def expanded(weight: Weight, axis: int) -> Weight:
    """With one more axis of length 1."""
    axes = (*weight.axes[:axis], (), *weight.axes[axis:])
    return weight.seen(
        axes, lambda q: expand_dims(q, (axis,)), lambda x: lax.expand_dims(x, (axis,))
    )


def _dynamic_slice(eqn: Any, weight: Weight, *starts: Any) -> Weight:
    sizes = eqn.params["slice_sizes"]

    def cut(q: QArray) -> QArray:
        for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            q = qarray.dynamic_index(q, axis, start, size)
        return q

    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        weight = cut_state(weight, axis, start, size)
    return weight.seen(weight.axes, cut, _bound(eqn, *starts))


def _frozen(eqn: Any, weight: Weight) -> Weight:
    """`stop_gradient`: codes have no gradient anyway, but what is trained has."""
    return weight.seen(weight.axes, lambda q: q, _bound(eqn))


def _same(eqn: Any, weight: Weight) -> Weight:
    """Identities: every leaf goes through the operation by itself."""

    def bind(part: Any) -> Any:
        return eqn.primitive.bind(part, **eqn.params)

    return weight.seen(weight.axes, lambda q: jax.tree.map(bind, q), bind)


def _constrain(eqn: Any, weight: Weight) -> Weight:
    sharding = eqn.params["sharding"]
    return weight.seen(weight.axes, lambda q: qarray.constrain(q, sharding), _bound(eqn))


def _reshard(eqn: Any, weight: Weight) -> Weight:
    sharding = eqn.params["dst_sharding"]

    def move(q: QArray) -> QArray:
        return jax.tree.map(jax.sharding.reshard, q, qarray.shardings_like(q, sharding))

    return weight.seen(weight.axes, move, _bound(eqn))


def cuts(eqn: Any, shape: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Starts and limits of the slices that `split` and `unstack` are."""
    axis = eqn.params["axis"]
    sizes = eqn.params["sizes"] if eqn.primitive.name == "split" else (1,) * shape[axis]
    found, start = [], 0
    for size in map(int, sizes):
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = start, start + size
        found.append((starts, limits))
        start += size
    return found


def split(eqn: Any, weight: Weight) -> list[Weight]:
    """`lax.split` as the slices that it is."""
    return [sliced(weight, *cut) for cut in cuts(eqn, weight.shape)]


def unstack(eqn: Any, weight: Weight) -> list[Weight]:
    """`unstack`: slices of length 1 without their axis."""
    return [squeezed(part, (eqn.params["axis"],)) for part in split(eqn, weight)]


def barrier(eqn: Any, operands: list[Any]) -> list[Any]:
    """`optimization_barrier` of everything that the operands hold."""
    leaves, tree = jax.tree.flatten(operands)
    return jax.tree.unflatten(tree, eqn.primitive.bind(*leaves, **eqn.params))


def device_put(eqn: Any, operands: list[Any]) -> list[Any]:
    """Moves each operand to where it is to go, codes and scales alike."""

    def move(x: Any, to: Any) -> Any:
        if isinstance(x, Joined):
            return dataclasses.replace(x, parts=tuple(move(part, to) for part in x.parts))
        if isinstance(x, Weight) and x.quantized and isinstance(to, jax.sharding.NamedSharding):
            codes = jax.device_put(x.value, qarray.shardings_like(x.value, to))
            return x.view(codes, x.axes, jax.device_put(x.trained, to))
        return x if to is None else jax.device_put(x, to)

    return list(map(move, operands, eqn.params["devices"]))


SPLITS: dict[str, Callable[..., list[Weight]]] = {"split": split, "unstack": unstack}

VIEWS: dict[str, Callable[..., Weight | None]] = {
    "transpose": _transpose,
    "convert_element_type": _convert,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "reduce_sum": _sum,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "stop_gradient": _frozen,
    "pvary": _same,
    "sharding_constraint": _constrain,
    "reshard": _reshard,
}
