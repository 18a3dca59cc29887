"""Parameters as the graph reads them: whole, or a slice of those that layers share as a stack."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..intercept import LeafPlan, Root
from ..qarray import QArray


def root_array(known: Mapping[str, Any], root: Root) -> Any:
    """The numbers of a root; `known` are the parameters by path, lazily loaded ones too."""
    leaf = known[root.path]
    if not root.steps:
        return leaf if isinstance(leaf, jax.Array) else jnp.asarray(np.asarray(leaf))
    steps = dict(root.steps)
    index = tuple(steps.get(axis, slice(None)) for axis in range(len(leaf.shape)))
    return jnp.asarray((leaf if isinstance(leaf, jax.Array) else np.asarray(leaf))[index])


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootPlan:
    """How a root will be held: the plan of its parameter, for one slice of it."""

    leaf: LeafPlan
    root: Root

    @property
    def _kept(self) -> list[int]:
        gone = dict(self.root.steps)
        return [axis for axis in range(len(self.leaf.shape)) if axis not in gone]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.leaf.shape[axis] for axis in self._kept)

    @property
    def contracted(self) -> tuple[int, ...]:
        return tuple(i for i, axis in enumerate(self._kept) if axis in self.leaf.contracted)

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(i for i, axis in enumerate(self._kept) if axis in self.leaf.stack)

    @property
    def roles(self) -> dict[str, Any]:
        """`contracted` and `stack`, as functions of weights take them."""
        return {"contracted": self.contracted, "stack": self.stack}


def assembled(slices: Mapping[Root, QArray], leaf: LeafPlan) -> QArray:
    """The QArray of a parameter from those of its slices.

    **Raises:** `ValueError` if one is missing.
    """
    first = next(iter(slices))
    if not first.steps:
        return slices[first]
    axes = [axis for axis, _ in first.steps]
    for axis in reversed(axes):
        slices = _stacked(slices, axis)
    (whole,) = slices.values()
    if tuple(whole.shape) != leaf.shape:
        raise ValueError(
            f"{leaf.path} has shape {leaf.shape}, but the layers that were calibrated make "
            f"{tuple(whole.shape)}. A scan may step through a part of it: leave it by a rule."
        )
    return whole


def assembled_state(states: Mapping[Root, Mapping[str, Any]], leaf: LeafPlan) -> dict[str, Any]:
    """The state of a site from that of its slices: the stack axes of `leaf` in front."""
    names = dict.fromkeys(name for state in states.values() for name in state)
    return {
        name: _joined_state({root: state[name] for root, state in states.items()}, name, leaf)
        for name in names
    }


def _joined_state(arrays: Mapping[Root, Any], name: str, leaf: LeafPlan) -> Any:
    if name.startswith("outlier"):
        # Slices have as many columns as they need: `k`, which is no column, fills them up.
        most = max(_places(x, name).shape[-1] for x in arrays.values())
        inputs = math.prod(leaf.shape[a] for a in leaf.contracted)
        fill = inputs if name == "outlier_columns" else 0
        arrays = {root: _filled(x, most, fill, name) for root, x in arrays.items()}
    arrays = dict(arrays)
    while any(root.steps for root in arrays):
        groups: dict[Root, list[tuple[int, Any]]] = {}
        for root, array in arrays.items():
            *rest, (axis, index) = root.steps
            outer = Root(path=root.path, steps=tuple(rest))
            groups.setdefault(outer, []).append((index, array))
        gone = {a for a, _ in next(iter(groups)).steps}
        place = sorted(set(leaf.stack) - gone).index(axis)
        arrays = {
            outer: jnp.stack([x for _, x in sorted(each, key=lambda pair: pair[0])], place)
            for outer, each in groups.items()
        }
    (array,) = arrays.values()
    return array


def _places(x: Any, name: str) -> Any:
    return x if name == "outlier_columns" else x[..., 0]


def _filled(x: Any, most: int, fill: int, name: str) -> Any:
    axis = x.ndim - (1 if name == "outlier_columns" else 2)
    room = [(0, most - x.shape[a] if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, room, constant_values=np.array(fill, x.dtype))


def _stacked(slices: Mapping[Root, QArray], axis: int) -> dict[Root, QArray]:
    """Slices that differ only in their index along `axis`, their last step, put together."""
    groups: dict[Root, list[tuple[int, QArray]]] = {}
    for root, q in slices.items():
        *rest, (own, index) = root.steps
        assert own == axis
        outer = Root(path=root.path, steps=tuple(rest))
        groups.setdefault(outer, []).append((index, q))
    result = {}
    for outer, members in groups.items():
        ordered = [q for _, q in sorted(members, key=lambda pair: pair[0])]
        # Where the axis stands among those that are left.
        place = axis - sum(a < axis for a, _ in outer.steps)
        result[outer] = stack_qarrays(ordered, place)
    return result


def replaced(q: QArray, other: QArray, where: np.ndarray, stack: tuple[int, ...]) -> QArray:
    """`q` with those entries of its stack axes that `where` picks taken from `other`."""

    def pick(a: Any, b: Any) -> Any:
        held, given = np.array(a), np.asarray(b)
        front = range(len(stack))
        # A view of what is held: writing to it writes there.
        np.moveaxis(held, stack, front)[where] = np.moveaxis(given, stack, front)[where]
        return jnp.asarray(held)

    return jax.tree.map(pick, q, other)


def stack_qarrays(arrays: Sequence[QArray], axis: int) -> QArray:
    """QArrays of one scheme and shape in the canonical layout, stacked along a new axis."""
    stacked = jax.tree.map(lambda *parts: jnp.stack([*map(jnp.asarray, parts)], axis), *arrays)
    return _moved(stacked, axis, len(arrays[0].shape))


def _moved(q: QArray, axis: int, ndim: int) -> QArray:
    """Short tiles are told by axes counted from the end: those before a new axis move."""
    moved = tuple((a if a + ndim >= axis else a - 1, t) for a, t in q.ragged)
    scale = _moved(q.scale, axis, ndim) if isinstance(q.scale, QArray) else q.scale
    return dataclasses.replace(q, ragged=moved, scale=scale)
