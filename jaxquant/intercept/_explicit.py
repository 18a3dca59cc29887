"""Meshes with axes of the type `Explicit`, where a sharding is part of an array's type.

Arithmetic on codes splits axes into tiles, for which such types have no rule. So it runs with axes
that XLA looks after, and its result gets the type that the user's equation has.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ..qarray import QArray, shardings_like
from ..qarray._sharding import is_explicit


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding in the type of an array or QArray (on its logical axes), if there is one."""
    leaf = x.codes if isinstance(x, QArray) else x
    if not isinstance(leaf, jax.Array):
        return None
    sharding = jax.typeof(leaf).sharding
    if sharding.mesh.empty or not is_explicit(sharding.mesh):
        return None
    if not isinstance(x, QArray):
        return sharding
    entries = (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
    by_axis = dict(zip(x.layout.permutation(x.ndim), entries, strict=True))
    return NamedSharding(sharding.mesh, PartitionSpec(*(by_axis[a] for a in range(x.ndim))))


def typed(function: Callable[..., Any], out: Any, *args: Any) -> Any:
    """`function(*args)` with an array of the sharding `out`, on axes that XLA looks after."""
    if out is None or out.mesh.empty or not is_explicit(out.mesh):
        return function(*args)
    with jax.sharding.use_abstract_mesh(out.mesh):
        return jax.sharding.auto_axes(function, out_sharding=out)(*args)


def typed_like(function: Callable[[Any], QArray], x: Any) -> QArray:
    """`function(x)`, a QArray whose codes are sharded as `x` is."""
    out = explicit_sharding(x)
    if out is None:
        return function(x)
    shapes = jax.eval_shape(function, jax.ShapeDtypeStruct(x.shape, x.dtype))
    mesh: Any = out.mesh
    run: Any = jax.sharding.auto_axes(function, out_sharding=shardings_like(shapes, out))
    with jax.sharding.use_abstract_mesh(mesh):
        return run(x)
