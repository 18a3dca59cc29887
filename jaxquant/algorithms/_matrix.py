"""Weights as matrices: a row for each output, a column for each input, stacks of them in front.

What a site algorithm is given and gives back; which axis of a weight plays which role is left to
these functions.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ..numerics._bytes import converted
from ..qarray import CANONICAL, dequantize, QArray, Scheme, tile_shape
from ..qarray._qarray import short_tiles, tile_counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """What an algorithm chose for a weight, in matrix form: `[*stack, rows, columns]`.

    `codes` are held a byte each (`numerics.as_bytes`) or in the format's storage; `scale` and
    `zero_point` have one entry a tile, and `scale` is a `QArray` in the same form where scales are
    held as codes. With a `permutation`, column `j` holds what belongs to the input
    `permutation[j]`. `losses` is what the outputs of a row err by under the statistics, squared and
    added up, and `plain_losses` what they do when it is rounded to nearest. `notes` are sentences
    for the account.
    """

    codes: Any
    scale: Any
    zero_point: Any = None
    offset: Any = None
    permutation: Any = None
    losses: Any = None
    plain_losses: Any = None
    notes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Roles:
    """The axes of a weight by role, in stored order."""

    stack: tuple[int, ...]
    kept: tuple[int, ...]
    contracted: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        return (*self.stack, *self.kept, *self.contracted)


def _roles(ndim: int, contracted: tuple[int, ...], stack: tuple[int, ...]) -> _Roles:
    inner = {a % ndim for a in contracted}
    outer = {a % ndim for a in stack}
    return _Roles(
        stack=tuple(sorted(outer)),
        kept=tuple(a for a in range(ndim) if a not in inner and a not in outer),
        contracted=tuple(sorted(inner)),
    )


def as_matrix(
    w: Shaped[Array, "..."], *, contracted: tuple[int, ...], stack: tuple[int, ...] = ()
) -> Shaped[Array, "*stack n k"]:
    """`w` with its stack axes first, then its kept axes as rows, its contracted ones as columns."""
    roles = _roles(w.ndim, contracted, stack)
    sizes = [w.shape[a] for a in roles.stack]
    n, k = (math.prod(w.shape[a] for a in axes) for axes in (roles.kept, roles.contracted))
    return w.transpose(roles.order).reshape(*sizes, n, k)


def from_matrix(
    m: Shaped[Array, "*stack n k"],
    shape: tuple[int, ...],
    *,
    contracted: tuple[int, ...],
    stack: tuple[int, ...] = (),
) -> Shaped[Array, "..."]:
    """The array of `shape` that `as_matrix` made `m` of.

    **Raises:** `ValueError` if `m` has not as many elements.
    """
    roles = _roles(len(shape), contracted, stack)
    if m.size != math.prod(shape):
        raise ValueError(
            f"A matrix of shape {tuple(m.shape)} is not one of an array of shape {shape}, with "
            f"axes {roles.contracted} contracted and {roles.stack} stacked."
        )
    back = np.argsort(roles.order).tolist()
    return m.reshape([shape[a] for a in roles.order]).transpose(back)


def matrix_tile(
    shape: tuple[int, ...],
    scheme: Scheme,
    *,
    contracted: tuple[int, ...],
    stack: tuple[int, ...] = (),
) -> tuple[int, int]:
    """How many rows and columns of the matrix of an array share one scale.

    **Raises:** `ValueError` where tiles do not fill an axis, or where they end at the ends of
    several axes, so that those of the matrix are not of one size.
    """
    roles = _roles(len(shape), contracted, stack)
    sizes = tile_shape(shape, scheme.tile, contracted=roles.contracted, stack=roles.stack)
    for axis, _ in short_tiles(shape, sizes):
        role = roles.contracted if axis + len(shape) in roles.contracted else roles.kept
        before = math.prod(shape[a] for a in role if a < axis + len(shape))
        if before > 1:
            raise ValueError(
                f"Tiles of {scheme} end raggedly at axis {axis + len(shape)} of an array of shape "
                f"{shape}, {before} times over, so that the axes {role} are no row of tiles of one "
                "size. Use a tile that divides that axis, or round this weight to nearest."
            )
    rows, columns = (math.prod(sizes[a] for a in axes) for axes in (roles.kept, roles.contracted))
    return rows, columns


def assemble(
    codes: Shaped[Array, "*stack n k"],
    scale: Any,
    zero_point: Shaped[Array, "*stack tn tk"] | None = None,
    *,
    shape: tuple[int, ...],
    dtype: Any,
    scheme: Scheme,
    contracted: tuple[int, ...],
    stack: tuple[int, ...] = (),
    offset: Float[Array, "*stack 1 1"] | None = None,
) -> QArray:
    """The canonical QArray of an array of `shape`, from its parts in matrix form.

    Codes may be held a byte each. A scale that is held as codes is a `QArray` in matrix form.

    **Raises:** `ValueError` where the parts do not fit the shape, as `matrix_tile` does too.
    """
    matrix_tile(shape, scheme, contracted=contracted, stack=stack)
    roles = _roles(len(shape), contracted, stack)
    tile = tile_shape(shape, scheme.tile, contracted=roles.contracted, stack=roles.stack)
    counts = tile_counts(shape, tile)

    def back(part: Any, shape: tuple[int, ...]) -> Any:
        return from_matrix(part, shape, contracted=roles.contracted, stack=roles.stack)

    if isinstance(scheme.scale, Scheme):
        scale = assemble(
            scale.codes,
            scale.scale,
            shape=counts,
            dtype=scale.dtype,
            scheme=scheme.scale,
            contracted=roles.contracted,
            stack=roles.stack,
            offset=scale.offset,
        )
    else:
        scale = back(scale, counts)
    ones = tuple(n if a in roles.stack else 1 for a, n in enumerate(shape))
    return QArray(
        codes=back(_as_stored(codes, scheme), shape),
        scale=scale,
        zero_point=None if zero_point is None else back(zero_point, counts),
        offset=None if offset is None else back(offset, ones),
        scheme=scheme,
        layout=CANONICAL,
        dtype=np.dtype(dtype),
        ragged=short_tiles(shape, tile),
    )


def _as_stored(codes: Shaped[Array, "..."], scheme: Scheme) -> Shaped[Array, "..."]:
    """Codes, a byte each, as their format stores them."""
    storage = scheme.values.storage
    if codes.dtype == storage:
        return codes
    return converted(codes, storage)


def held_values(
    q: QArray,
    state: Mapping[str, Any],
    *,
    contracted: tuple[int, ...],
    stack: tuple[int, ...],
) -> Float[Array, "*stack n k"]:
    """What codes stand for where the inputs are those of the model: with the order and the factors
    taken back that the state of a site (`permutation`, `smoothing`) has its inputs take."""
    matrix = as_matrix(dequantize(q, jnp.float32), contracted=contracted, stack=stack)
    if "smoothing" in state:
        matrix = matrix / state["smoothing"][..., None, :]
    if "permutation" not in state:
        return matrix
    back = jnp.argsort(state["permutation"], axis=-1)[..., None, :]
    return jnp.take_along_axis(matrix, back, axis=-1)
