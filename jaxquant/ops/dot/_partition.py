"""Kernels on several devices: each multiplies its own shard, and weights are never gathered.

XLA cannot cut a kernel by itself, so it is called inside `shard_map`. Where the weight is cut along
its outputs (column-parallel) nothing is exchanged; where it is cut along what is summed
(row-parallel), the partial sums are added in float32 by one all-reduce. Mesh axes that do not cut
the weight deal out the rows of the activations, where these divide.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array

from ...qarray import leaf_specs, QArray, retile
from ...qarray._sharding import axes_of, shards_of
from ._call import DotCall, Layer
from ._gemm import weight_side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How a product of rows by one matrix is dealt out: the mesh axes of rows, `k` and `n`."""

    mesh: AbstractMesh
    rows: tuple[str, ...]
    k: tuple[str, ...]
    n: tuple[str, ...]

    def count(self, names: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[name] for name in names)


def cut_of(call: DotCall) -> Cut | str | None:
    """How the call is dealt out; `None` if it is not; or why that is not known."""
    side = weight_side(call)
    assert side is not None
    mesh = _automatic_mesh(call)
    if mesh is None:
        return None
    if call.sharding is None:
        return (
            f"the mesh has {mesh.size} devices, and how the weight lies on them is not known: plan "
            "with sharded variables, or with `sharding=`"
        )
    spec = call.sharding.spec
    entries = (*spec, *(None,) * (2 - len(spec)))
    names = [axes_of(entry) for entry in entries]
    summed = call.contracted[side][0]
    k, n = names[summed], names[1 - summed]
    free = tuple(a for a in mesh.axis_names if a not in k + n and mesh.shape[a] > 1)
    rows = free if call.rows(1 - side) % math.prod(mesh.shape[a] for a in free) == 0 else ()
    return Cut(mesh=mesh, rows=rows, k=k, n=n)


def _automatic_mesh(call: DotCall) -> AbstractMesh | None:
    """The mesh over which XLA would have to cut the call, if it has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and call.sharding is not None:
        own = call.sharding.mesh
        mesh = own if isinstance(own, AbstractMesh) else own.abstract_mesh
    if mesh.empty or mesh.size == 1:
        return None
    # Inside a `shard_map` of the user's, each device sees its shard already.
    if all(kind == AxisType.Manual for kind in mesh.axis_types):
        return None
    return mesh


def local_weight(w: QArray, cut: Cut, summed: int) -> QArray | str:
    """The shapes of one device's shard of a weight of two logical axes, or why it has none."""
    for axis, names in ((summed, cut.k), (1 - summed, cut.n)):
        if w.shape[axis] % cut.count(names):
            return f"{cut.count(names)} devices do not divide axis {axis} of {w.shape[axis]}"
    fitted = jax.eval_shape(lambda w: _fitted(w, cut, summed), w)
    try:
        specs = _specs(fitted, cut, summed)
    except ValueError as error:
        return str(error)

    def shard(leaf: Any, spec: PartitionSpec) -> Any:
        entries = (*spec, *(None,) * (len(leaf.shape) - len(spec)))
        sizes = [n // shards_of(e, cut.mesh) for n, e in zip(leaf.shape, entries, strict=True)]
        return jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype)

    return jax.tree.map(shard, fitted, specs)


def local_activations(tile: int, k: int, cut: Cut) -> int:
    """The tile along `k` of one device's part of quantized activations."""
    local = k // cut.count(cut.k)
    return local if tile == k else math.gcd(tile, local) if cut.k else tile


def _fitted(w: QArray, cut: Cut, summed: int) -> QArray:
    """The weight, or a stack of it, with tiles that no device's shard cuts."""
    first = w.ndim - 2
    for axis, names in ((first + summed, cut.k), (first + 1 - summed, cut.n)):
        count = cut.count(names)
        if count > 1 and w.tile[axis] > 1:
            w = retile(w, axis, math.gcd(w.tile[axis], w.shape[axis] // count))
    return w


def _specs(w: QArray, cut: Cut, summed: int) -> QArray:
    by_axis = {summed: cut.k or None, 1 - summed: cut.n or None}
    first = (None,) * (w.ndim - 2)
    return leaf_specs(w, PartitionSpec(*first, by_axis[0], by_axis[1]), cut.mesh)


def dealt_out(
    multiply: Callable[..., Array], cut: Cut, summed: int, out_dtype: Any
) -> Callable[..., Array]:
    """`multiply(x, w, dtype)` as a function of whole arrays that runs on each device's shards.

    Both take the layer of a stack that the weight is, if it is one.

    `x [rows, k]` may be a QArray, whose scales follow it where tiles fill shards.
    """

    def whole(x: Any, w: QArray, *layer: Layer) -> Array:
        fitted = _fitted(w, cut, summed)
        rows, k, n = (names or None for names in (cut.rows, cut.k, cut.n))
        x_spec: Any = PartitionSpec(rows, k)
        if isinstance(x, QArray):
            tile = x.tile[1]
            if cut.k and tile != x.shape[1]:
                x = retile(x, 1, math.gcd(tile, x.shape[1] // cut.count(cut.k)))
            x_spec = leaf_specs(x, x_spec, cut.mesh)

        def shard(x: Any, w: QArray, *layer: Layer) -> Array:
            if not cut.k:
                return multiply(x, w, out_dtype, *layer)
            return lax.psum(multiply(x, w, jnp.float32, *layer), cut.k).astype(out_dtype)

        stacks = [dataclasses.replace(at, stack=_fitted(at.stack, cut, summed)) for at in layer]
        layer_specs = [
            Layer(stack=_specs(at.stack, cut, summed), index=PartitionSpec()) for at in stacks
        ]
        return jax.shard_map(
            shard,
            mesh=cut.mesh,
            in_specs=(x_spec, _specs(fitted, cut, summed), *layer_specs),
            out_specs=PartitionSpec(rows, n),
            check_vma=False,
        )(x, fitted, *stacks)

    return whole
