"""How parameters lie on a mesh: noted in the plan, and told to kernels at each site."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from ..qarray._sharding import axes_of, constrain, replicated_axes
from ._explicit import explicit_sharding
from ._plan import LeafPlan, Plan, PlanError
from ._weight import Weight


def placed(plan: Plan, shardings: Mapping[str, NamedSharding]) -> Plan:
    """The plan with where its leaves lie, by path.

    **Raises:** `PlanError` if they lie on different meshes.
    """
    meshes = {sharding.mesh.abstract_mesh for sharding in shardings.values()}
    if len(meshes) > 1:
        raise PlanError(
            f"The parameters lie on {len(meshes)} meshes: {', '.join(map(str, meshes))}. Shard all "
            "of them over one."
        )
    leaves = tuple(_leaf(leaf, shardings.get(leaf.path)) for leaf in plan.leaves)
    return dataclasses.replace(plan, leaves=leaves, mesh=next(iter(meshes), None))


def _leaf(leaf: LeafPlan, sharding: NamedSharding | None) -> LeafPlan:
    """The leaf with what its sharding means for its scales."""
    if sharding is None:
        return leaf
    entries = (*sharding.spec, *(None,) * (len(leaf.shape) - len(sharding.spec)))
    return dataclasses.replace(
        leaf,
        spec=tuple(",".join(map(str, axes_of(entry))) for entry in entries),
        replicated=replicated_axes(leaf.abstract, sharding.spec, sharding.mesh),
    )


def weight_sharding(weight: Weight, plan: Plan) -> NamedSharding | None:
    """How a weight lies where it is met, by its present axes: as its type says, else as planned.

    `None` where neither tells.
    """
    found = explicit_sharding(weight.value)
    if found is not None:
        return found
    leaf = plan.by_path.get(weight.path)
    mesh: Any = plan.mesh
    if leaf is None or not leaf.spec or mesh is None:
        return None
    entries = []
    for stored in weight.axes:
        names = [leaf.spec[axis] for axis in stored]
        if any(names[1:]):
            # Of axes that were merged, only the first one's shards are runs of neighbours.
            return None
        entries.append(tuple(names[0].split(",")) if names and names[0] else None)
    return NamedSharding(_automatic(mesh), PartitionSpec(*entries))


def gathered(weight: Weight, plan: Plan, axes: frozenset[str]) -> Weight:
    """The weight with codes that no mesh axis of `axes` cuts; its float array stays where it lies.

    So codes are what devices exchange, and the gradient of the array is summed into its shards.
    """
    lies = weight_sharding(weight, plan)
    if lies is None:
        return weight
    # Cut first: where codes are made is where the array lies.
    codes = constrain(constrain(weight.value, lies), undivided(lies, axes))
    trained = jax.lax.with_sharding_constraint(weight.trained, lies)
    return dataclasses.replace(weight, value=codes, trained=trained)


def undivided(sharding: NamedSharding, axes: frozenset[str]) -> NamedSharding:
    """The sharding without the mesh axes `axes`."""
    kept = [tuple(name for name in axes_of(entry) if name not in axes) for entry in sharding.spec]
    return NamedSharding(sharding.mesh, PartitionSpec(*(names or None for names in kept)))


def check_gathered(plan: Plan, axes: frozenset[str]) -> None:
    """**Raises:** `PlanError` for a mesh axis that cuts no quantized parameter of the plan."""
    known = {name for leaf in plan.leaves for entry in leaf.spec for name in entry.split(",")}
    unknown = sorted(axes - known)
    if unknown:
        raise PlanError(
            f"gather={unknown[0]!r} names a mesh axis that cuts no quantized parameter; those that "
            f"do are: {', '.join(sorted(known - {''})) or 'none'}. Make the plan with variables "
            "that lie on the mesh, or with sharding=."
        )


def _automatic(mesh: AbstractMesh) -> AbstractMesh:
    """The same mesh with axes that XLA looks after."""
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, kinds)
