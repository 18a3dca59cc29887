"""Names of axes on quantized parameters: one spec for the codes, another for the scales.

Flax keeps the names of a parameter's axes beside its value: in a box around it (Linen), or in the
metadata of its Variable (NNX), and makes one `PartitionSpec` of them. The codes of a QArray take
that one. On an axis where there are fewer scales than values, the scales take the name only if the
mesh is known and cuts no tile, and are replicated otherwise. `nn.get_partition_spec` and
`nnx.get_partition_spec` give each leaf the spec that fits it, in a tree of the same structure.

The mesh is the box's own, or the one of `jax.set_mesh`. Logical names are looked up in the rules
that are in force.
"""

from typing import Any

import jax
from flax import linen as nn, nnx
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from ..qarray import is_qarray, leaf_specs, QArray
from ..qarray._sharding import with_specs


def specs_by_name(q: QArray, names: Any, on_mesh: Any, mesh: Any) -> QArray:
    """The spec of each leaf of `q`, whose logical axes are called `names`.

    `on_mesh` are the mesh axes that stand for these names on `mesh`, which may be `None`.
    """
    names = (*names, *(None,) * (q.ndim - len(names)))
    on_mesh = (*on_mesh, *(None,) * (q.ndim - len(on_mesh)))
    packed = q.layout.permutation(q.ndim)[-1] if q.layout.packed is not None else None
    shards: dict[int, int] = {}
    for axis, (name, entry) in enumerate(zip(names, on_mesh, strict=True)):
        count = _shards(entry, mesh)
        if name is None or (count is None and axis == packed):
            continue
        # As many shards as elements: whatever the mesh is, only scales one an element follow.
        shards[axis] = q.shape[axis] if count is None else count
    # Each axis under a name of its own, since several may have one name before rules are applied.
    own = {str(axis): names[axis] for axis in shards}
    spec = PartitionSpec(*(str(axis) if axis in shards else None for axis in range(q.ndim)))
    specs = leaf_specs(q, spec, AbstractMesh(tuple(shards.values()), tuple(own)))

    def named(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(None if axis is None else own[axis] for axis in spec))

    return with_specs(specs, named)


def _shards(entry: Any, mesh: Any) -> int | None:
    """Into how many shards a mesh cuts an axis; `None` where that is not known."""
    count = 1
    for name in entry if isinstance(entry, tuple) else (entry,):
        if mesh is None or name not in mesh.shape:
            return None
        count *= mesh.shape[name]
    return count


def _mesh(own: Any = None) -> Any:
    mesh = jax.sharding.get_abstract_mesh() if own is None else own
    return None if mesh.empty else mesh


class _SharesNames:
    """What boxes of Flax's do with their names once there is a QArray in them."""

    value: Any
    names: Any
    mesh: Any
    replace: Any

    def _on_mesh(self) -> Any:
        """The mesh axes that stand for the names."""
        return self.names

    def _shardings(self, mesh: Any) -> QArray:
        entries = self._on_mesh()
        specs = specs_by_name(self.value, entries, entries, mesh)
        return with_specs(specs, lambda spec: NamedSharding(mesh, spec))

    def get_partition_spec(self) -> Any:
        """A box like this one that holds the spec of each leaf, in the names of the box."""
        if not is_qarray(self.value):
            return super().get_partition_spec()  # pyright: ignore[reportAttributeAccessIssue]
        mesh = _mesh(self.mesh)
        return self.replace(value=specs_by_name(self.value, self.names, self._on_mesh(), mesh))

    def unbox(self, apply_constraint: bool = True) -> Any:
        mesh = _mesh(self.mesh)
        if not is_qarray(self.value) or not apply_constraint or mesh is None:
            constrained = apply_constraint and not is_qarray(self.value)
            return super().unbox(constrained)  # pyright: ignore[reportAttributeAccessIssue]
        return jax.tree.map(jax.lax.with_sharding_constraint, self.value, self._shardings(mesh))


class QuantizedPartitioned(_SharesNames, nn.Partitioned):
    """`nn.Partitioned` around a QArray; around anything else it is just that."""

    def get_sharding(self, mesh: Any) -> Any:
        if not is_qarray(self.value):
            return super().get_sharding(mesh)
        return self.replace(value=self._shardings(mesh))


class QuantizedLogicallyPartitioned(_SharesNames, nn.LogicallyPartitioned):
    """`nn.LogicallyPartitioned` around a QArray; around anything else it is just that."""

    def _on_mesh(self) -> Any:
        found = logical_to_mesh_axes(self.names, self.rules)
        return self.names if found is None else found


class QuantizedParam(nnx.Param):
    """`nnx.Param` with names of axes that holds a QArray; holding anything else it is just that."""

    def replace(self, *args: Any, **updates: Any) -> Any:
        value = self.get_raw_value()
        if is_qarray(value) and args and isinstance(args[0], PartitionSpec):
            mesh = _mesh(self.get_metadata().get("mesh"))
            args = (specs_by_name(value, args[0], args[0], mesh), *args[1:])
        return self.copy(*args, **updates)


QUANTIZED: dict[type[Any], type[Any]] = {
    nn.Partitioned: QuantizedPartitioned,
    nn.LogicallyPartitioned: QuantizedLogicallyPartitioned,
    nnx.Param: QuantizedParam,
}
"""Flax's types, and ours that take their place around QArrays. Users' own types stay."""


def named_by_leaf(variables: Any) -> Any:
    """The same tree, with names on QArrays in the types that know how to share them out."""

    def one(x: Any) -> Any:
        if type(x) is nnx.Param:
            metadata = x.get_metadata()
            if is_qarray(x.get_raw_value()) and metadata.get("out_sharding"):
                return QuantizedParam.from_metadata(x.get_raw_value(), metadata)
        elif type(x) in QUANTIZED and is_qarray(x.value):
            return QUANTIZED[type(x)](**vars(x))
        return x

    return jax.tree.map(one, variables, is_leaf=lambda x: type(x) in QUANTIZED)
