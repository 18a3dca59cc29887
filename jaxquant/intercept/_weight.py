"""A parameter on its way through a model: its value, its origin, what became of its axes."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax

from ..ops.dot import Layer
from ..qarray import QArray

Position = tuple[int | str, ...]
"""Where an equation stands: its index in the jaxpr, then in the jaxpr inside it, and so on."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """An array or QArray that is derived from the parameter at `path`.

    `stored` is the shape of the parameter. `axes[i]` are the stored axes that present axis `i` is
    made of: several where axes were merged, none where an axis of length 1 was added. Stored axes
    that stand nowhere were sliced away: they are stack axes. `via` names the first operation that
    made this something other than a view of the parameter; it is `None` for views. `scans` are the
    loops that hand out one slice a step. Inside a `shard_map`, `shards` are the mesh axes that cut
    each stored axis.

    `state` is that of its sites, arrays by site id and name (see `_states`). Their leading axes are
    the stored stack axes in `state_axes`: one each, or several where they were merged.

    `layer` is where its value lies in a stack, while it is just what a loop took out of it.

    `trained` is the array that `value` was quantized from, seen in the same way: what gradients of
    this weight are gradients of. Only in training there is one.
    """

    value: Any
    path: str = dataclasses.field(metadata={"static": True})
    axes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    stored: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    via: str | None = dataclasses.field(default=None, metadata={"static": True})
    scans: tuple[Position, ...] = dataclasses.field(default=(), metadata={"static": True})
    shards: tuple[tuple[str, ...], ...] = dataclasses.field(default=(), metadata={"static": True})
    state: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    state_axes: tuple[tuple[int, ...], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )
    layer: Layer | None = None
    trained: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def ndim(self) -> int:
        return len(self.value.shape)

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    @property
    def quantized(self) -> bool:
        return isinstance(self.value, QArray)

    def shards_of(self, axis: int) -> tuple[str, ...]:
        """The mesh axes that cut the present `axis`."""
        stored = self.axes[axis] if self.shards else ()
        return tuple(name for s in stored for name in self.shards[s])

    def view(self, value: Any, axes: tuple[tuple[int, ...], ...], trained: Any = None) -> "Weight":
        """The same parameter, seen differently; without `trained` that stays as it is."""
        # A cast of a QArray changes what it stands for, and none of its arrays.
        same = axes == self.axes and _same_arrays(value, self.value)
        layer = self.layer if same else None
        trained = self.trained if trained is None else trained
        return dataclasses.replace(self, value=value, axes=axes, layer=layer, trained=trained)

    def seen(
        self,
        axes: tuple[tuple[int, ...], ...],
        of_qarray: Callable[[QArray], QArray],
        of_array: Callable[[Any], Any],
    ) -> "Weight":
        """The same parameter, seen differently: its codes, and the array, each in its way."""
        value = of_qarray(self.value) if self.quantized else of_array(self.value)
        return self.view(value, axes, None if self.trained is None else of_array(self.trained))

    def with_state(self, state: Any, axes: tuple[tuple[int, ...], ...] | None = None) -> "Weight":
        """The same weight with other state, whose leading axes are `axes`, or the same ones."""
        axes = self.state_axes if axes is None else axes
        return dataclasses.replace(self, state=state, state_axes=axes)


def _same_arrays(a: Any, b: Any) -> bool:
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(leaves[0]) == len(leaves[1]) and all(x is y for x, y in zip(*leaves, strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Joined:
    """Weights, and arrays beside them, put together along `axis`: what `_joined` follows.

    At least one part is a `Weight` or a `Joined` of another axis.
    """

    parts: tuple[Any, ...]
    axis: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(self.sizes)
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return len(self.parts[0].shape)

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        """The length of each part along the joined axis."""
        return tuple(part.shape[self.axis] for part in self.parts)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each part begins."""
        return tuple(itertools.accumulate(self.sizes, initial=0))[:-1]

    @property
    def weights(self) -> list[Weight]:
        """Every weight in it."""
        nested = [x.weights if isinstance(x, Joined) else [x] for x in self.parts if is_weight(x)]
        return [weight for weights in nested for weight in weights]


def whole(value: Any, path: str) -> Weight:
    """The parameter at `path` as it is stored."""
    shape = tuple(value.shape)
    return Weight(value=value, path=path, stored=shape, axes=tuple((i,) for i in range(len(shape))))


def same_view(a: Any, b: Any) -> bool:
    """Whether two weights are the same parameter, seen in the same way, as a whole."""
    if not isinstance(a, Weight) or not isinstance(b, Weight) or a.via is not None:
        return False
    return (a.path, a.axes, a.shape, a.scans) == (b.path, b.axes, b.shape, b.scans)


def is_weight(x: Any) -> bool:
    """Whether `x` is a `Weight`, or several put together; for `is_leaf=`."""
    return isinstance(x, (Weight, Joined))


CLOSED_OVER = "<closed over"
"""How the path of an array starts that a model uses without having it among its variables."""

STACK, BATCH, CONTRACTED, KEPT = "stack", "batch", "contracted", "kept"


def roles(weight: Weight, contracted: Any, batch: Any) -> tuple[str, ...] | str:
    """The role of each stored axis of a weight that an op reads.

    `contracted` and `batch` are present axes. A string says why no roles can be given.
    """
    result: dict[int, str] = {}
    for axis, stored_axes in enumerate(weight.axes):
        role = CONTRACTED if axis in contracted else BATCH if axis in batch else KEPT
        for stored in stored_axes:
            if result.setdefault(stored, role) != role:
                return f"axis {stored} of the parameter is split into {result[stored]} and {role}"
    return tuple(result.get(axis, STACK) for axis in range(len(weight.stored)))
