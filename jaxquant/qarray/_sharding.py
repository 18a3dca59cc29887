"""How a QArray is spread over devices.

Codes follow the weight. Scales and zero points follow on each axis where tile boundaries fall on
shard boundaries; on other axes they are replicated.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ._qarray import QArray


def axes_of(entry: Any) -> tuple[Any, ...]:
    """The mesh axes that one entry of a `PartitionSpec` names."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def shards_of(entry: Any, mesh: Mesh | AbstractMesh) -> int:
    """Into how many shards one entry of a `PartitionSpec` cuts an axis."""
    if entry is PartitionSpec.UNCONSTRAINED:
        return 1
    return math.prod(mesh.shape[name] for name in axes_of(entry))


def leaf_specs(q: QArray, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> QArray:
    """The `PartitionSpec` of each leaf of `q`, for a weight placed by `spec` (logical axes).

    **Raises:** `ValueError` where a packed byte would straddle two shards.
    """
    entries = tuple(spec) + (None,) * (q.ndim - len(tuple(spec)))
    stored = tuple(entries[a] for a in q.layout.permutation(q.ndim))
    if q.layout.packed is not None:
        shards = shards_of(stored[-1], mesh)
        if q.stored_shape[-1] % (shards * q.layout.packed):
            raise ValueError(
                f"{shards} shards of an axis of {q.stored_shape[-1]} codes would cut packed blocks "
                f"of {q.layout.packed}. Shard it less, or keep it unpacked."
            )
    short = {axis + q.ndim for axis, _ in q.ragged}
    scale = PartitionSpec(
        *(
            entry if i not in short and n % shards_of(entry, mesh) == 0 else None
            for i, (entry, n) in enumerate(zip(stored, q.scale.shape, strict=True))
        )
    )
    parts: dict[str, Any] = {"codes": PartitionSpec(*stored), "scale": scale}
    if isinstance(q.scale, QArray):
        parts["scale"] = leaf_specs(q.scale, scale, mesh)
    if q.zero_point is not None:
        parts["zero_point"] = scale
    if q.offset is not None:
        # Of length 1 but along stack axes.
        parts["offset"] = PartitionSpec(
            *(None if n == 1 else e for e, n in zip(stored, q.offset.shape, strict=True))
        )
    return dataclasses.replace(q, **parts)


def replicated_axes(q: QArray, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> tuple[int, ...]:
    """Logical axes that `spec` shards but on which the scales of `q` must be replicated."""
    specs = leaf_specs(q, spec, mesh)
    permutation = q.layout.permutation(q.ndim)
    scale = specs.scale.codes if isinstance(q.scale, QArray) else specs.scale
    pairs = zip(permutation, specs.codes, scale, strict=True)
    return tuple(sorted(a for a, codes, scale in pairs if codes != scale))


def shardings_like(q: QArray, sharding: NamedSharding) -> QArray:
    """The sharding of each leaf of `q`, for a weight placed by `sharding`."""
    specs = leaf_specs(q, sharding.spec, sharding.mesh)
    return with_specs(
        specs, lambda spec: NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    )


def with_specs(specs: QArray, each: Callable[[PartitionSpec], Any]) -> QArray:
    """`each` of the specs that `specs` holds in place of leaves."""
    return jax.tree.map(each, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def place(q: QArray, sharding: NamedSharding) -> QArray:
    """Moves the leaves of `q` to where `sharding` would put the weight."""
    return jax.tree.map(jax.device_put, q, shardings_like(q, sharding))


def constrain(q: QArray, sharding: NamedSharding) -> QArray:
    """`with_sharding_constraint` for a QArray inside `jit`."""
    return jax.tree.map(jax.lax.with_sharding_constraint, q, shardings_like(q, sharding))


@contextlib.contextmanager
def automatic(sharding: Any) -> Iterator[Any]:
    """The same sharding on a mesh whose axes XLA looks after, with that mesh in force.

    Axes of the type `Explicit` are part of an array's type, and tiles of an axis that is sharded so
    have no such type. Nothing moves between devices. Other shardings are left as they are.
    """
    if not isinstance(sharding, NamedSharding) or not is_explicit(sharding.mesh):
        yield sharding
        return
    assert isinstance(sharding.mesh, Mesh)
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
    with jax.set_mesh(mesh):
        yield NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether shardings on this mesh are part of types."""
    return any(kind == AxisType.Explicit for kind in mesh.axis_types)
