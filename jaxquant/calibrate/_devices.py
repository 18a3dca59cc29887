"""Several devices: windows are dealt out over one axis of a mesh, and so are rows of weights.

With a `unit`, each device runs as many windows at a time, on arrays of that shape, and statistics
are added in the order of the windows: any number of devices gives the same bits as one. Without,
batches lie over the devices and sums are whatever the compiler makes of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..intercept._trace import is_array

Batch = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """What is run at once: as `like`, of which `leaves` hold one or, along a new axis, several.

    `count` of them are real; others only fill the devices.
    """

    like: Batch
    leaves: list[Any]
    count: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """A mesh, the axis of it that windows are dealt out over, and how many a device takes at once.

    **Raises:** `ValueError` for an axis that the mesh has not.
    """

    mesh: Mesh
    axis: str
    unit: int | None

    def __post_init__(self) -> None:
        if self.axis not in self.mesh.shape:
            raise ValueError(
                f"The mesh has axes {tuple(self.mesh.shape)}, and none is called {self.axis!r}. "
                "Say over which to deal out the data (axis=...)."
            )

    @property
    def count(self) -> int:
        return self.mesh.shape[self.axis]

    def _sharding(self, *axes: str | None) -> NamedSharding:
        # Nothing here is written for explicit axes.
        types = (AxisType.Auto,) * self.mesh.devices.ndim
        mesh = Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=types)
        return NamedSharding(mesh, PartitionSpec(*axes))

    def rounds(self, batches: Sequence[Batch]) -> list[Round]:
        """Batches laid over the devices; with a unit, so many units (see `in_units`) at a time."""
        if self.unit is None:
            return [Round(like=b, leaves=[self.laid(x) for x in leaves_of(b)]) for b in batches]
        runs: list[list[Batch]] = []
        for batch in batches:
            whole = not runs or len(runs[-1]) == self.count
            if whole or _shapes(runs[-1][0]) != _shapes(batch):
                runs.append([])
            runs[-1].append(batch)
        return [Round(like=run[0], leaves=self._together(run), count=len(run)) for run in runs]

    def _together(self, run: list[Batch]) -> list[Any]:
        filled = [leaves_of(b) for b in (*run, *[run[-1]] * (self.count - len(run)))]
        held = (np.stack([np.asarray(x) for x in leaves]) for leaves in zip(*filled, strict=True))
        return [jax.device_put(x, self._sharding(self.axis)) for x in held]

    def laid(self, x: Any) -> Any:
        """A value that depends on the data, over the devices if it is not there yet."""
        if isinstance(x, jax.Array) and len(x.sharding.device_set) == self.mesh.size:
            return x
        cut = x.ndim > 0 and x.shape[0] % self.count == 0
        return jax.device_put(x, self._sharding(self.axis) if cut else self._sharding())

    def everywhere(self, x: Any) -> Any:
        """An array as a whole on each device."""
        return jax.device_put(x if isinstance(x, jax.Array) else np.asarray(x), self._sharding())

    def by_rows(self, w: Any) -> Any:
        """A weight in matrix form, `[*stack, n, k]`, with its rows dealt out where they divide.

        With a unit it is whole everywhere: products of fewer rows add up in another order.
        """
        if self.unit is not None or w.shape[-2] % self.count:
            return self.everywhere(w)
        return jax.device_put(w, self._sharding(*[None] * (w.ndim - 2), self.axis))

    def compiled(self, run: Callable[..., Any], moving: tuple[bool, ...]) -> Callable[..., Any]:
        """`run` of a list, of which those that are `moving` are laid over the devices."""
        if self.unit is None:
            return jax.jit(run)

        def one(inputs: list[Any]) -> Any:
            own = [x[0] if moves else x for x, moves in zip(inputs, moving, strict=True)]
            return jax.tree.map(lambda x: x[None], run(own))

        dealt = PartitionSpec(self.axis)
        specs = [dealt if moves else PartitionSpec() for moves in moving]
        # What the model does in it was not written for a `shard_map`.
        return jax.jit(
            jax.shard_map(
                one,
                mesh=self._sharding().mesh,
                in_specs=(specs,),
                out_specs=dealt,
                check_vma=False,
            )
        )

    def apart(self, statistics: Any, count: int) -> list[Any]:
        """The statistics of a round one by one, each on all devices, in the order of windows."""
        if self.unit is None:
            return [statistics]
        take = jax.jit(_entry, out_shardings=self._sharding())
        return [take(statistics, jnp.int32(i)) for i in range(count)]


def _entry(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def leaves_of(batch: Batch) -> list[Any]:
    """The arrays of a batch; numbers and flags of Python decide what is traced."""
    return [jnp.asarray(x) for x in jax.tree.leaves(batch) if is_array(x)]


def _shapes(batch: Batch) -> Any:
    return [(x.shape, x.dtype) for x in leaves_of(batch)]


def in_units(batches: Sequence[Batch], unit: int) -> list[Batch]:
    """Batches of `unit` windows, the leading axis of each array; what is left over is smaller.

    **Raises:** `ValueError` for a unit below 1, or arrays without such an axis.
    """
    parts: list[Batch] = []
    for batch in batches:
        sizes = {np.shape(x)[0] if np.ndim(x) else None for x in jax.tree.leaves(batch)}
        size = next(iter(sizes), None)
        if unit < 1 or len(sizes) != 1 or size is None:
            raise ValueError(
                f"A unit of {unit} windows: each array of a batch has windows along its leading "
                f"axis, as many as the others; got lengths {sizes}. Give at least 1, or no unit."
            )
        cuts = range(0, size, unit)
        parts += [jax.tree.map(functools.partial(_window, i, unit), batch) for i in cuts]
    return parts


def _window(start: int, unit: int, x: Any) -> Any:
    return x[start : start + unit]


def local(tree: Any, devices: Devices | None) -> Any:
    """Arrays that may lie over several devices, or be bound to one, on the default one.

    Without a mesh they stay where they are: nothing they meet lies elsewhere.
    """
    if devices is None:
        return tree
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)
