"""A dot as kernels see it: rows of activations by one matrix of codes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ...numerics import AbsMax, FLOAT32
from ...qarray import CANONICAL, QArray
from ...qarray._layout import inverse
from ...qarray._qarray import short_tiles
from .._factors import kept_scale
from ._call import DotCall


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Gemm:
    """`x [rows, k]` by a weight that is stored as `[k, n]`, or as `[n, k]` if `outputs_first`.

    `x` is an array, or a QArray of two axes. `w` is the weight as it is stored: a QArray of two
    axes in its layout. `finish` gives a result `[rows, n]` the axes that the call wants.
    """

    x: Any
    w: QArray
    outputs_first: bool
    finish: Callable[[Array], Array]

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def k(self) -> int:
        return self.w.stored_shape[1 if self.outputs_first else 0]

    @property
    def n(self) -> int:
        return self.w.stored_shape[0 if self.outputs_first else 1]

    @property
    def group(self) -> int:
        """How many neighbours along `k` share a scale; `k` itself where all do."""
        return self.w.stored_tile[1 if self.outputs_first else 0]


def refuses_shape(call: DotCall) -> str | None:
    """Why a call is no product of rows by one stored matrix, or `None`."""
    weight = weight_side(call)
    if weight is None:
        return "neither side is a QArray"
    w = (call.lhs, call.rhs)[weight]
    if call.batch[0]:
        return "the product has batch axes; map over them with `vmap`"
    if w.ndim != 2 or len(call.contracted[weight]) != 1:
        return (
            f"kernels read weights of two axes, one of them summed; this one has {w.ndim}, and "
            f"{len(call.contracted[weight])} of them are summed"
        )
    if w.offset is not None:
        return "the codes are centered"
    return None


def weight_side(call: DotCall) -> int | None:
    """Which operand is the weight: the QArray, the right one if both are."""
    for side in (1, 0):
        if isinstance((call.lhs, call.rhs)[side], QArray):
            return side
    return None


def outputs_first(call: DotCall) -> bool:
    """Whether the weight is stored as `[n, k]`. Only where `refuses_shape` is `None`."""
    side = weight_side(call)
    assert side is not None
    w = (call.lhs, call.rhs)[side]
    return w.layout.permutation(2)[0] != call.contracted[side][0]


def as_gemm(call: DotCall) -> Gemm:
    """The call in this form. Only where `refuses_shape` is `None`."""
    side = weight_side(call)
    assert side is not None
    turned = call if side == 1 else call.flipped
    x, w = turned.lhs, turned.rhs
    free = turned.free(0)
    order = (*free, turned.contracted[0][0])
    kept = tuple(x.shape[a] for a in free)

    def finish(y: Array) -> Array:
        n = y.shape[-1]
        y = y.reshape(*kept, n)
        return y if side == 1 else jnp.moveaxis(y, -1, 0)

    return Gemm(x=_rows(x, order), w=w, outputs_first=outputs_first(call), finish=finish)


def _rows(x: Any, order: tuple[int, ...]) -> Any:
    """The axes of `x` in `order`, all but the last one made one."""
    if isinstance(x, QArray):
        return _rows_of_codes(x, order)
    if order != tuple(range(len(order))):
        x = x.transpose(order)
    return x.reshape(-1, x.shape[-1])


def _rows_of_codes(x: QArray, order: tuple[int, ...]) -> QArray:
    """The same of a QArray that is not packed: scales in float32, one for each row and tile."""
    stored = inverse(x.layout.permutation(x.ndim))
    summed = order[-1]
    scale = kept_scale(x, [a == summed for a in x.layout.permutation(x.ndim)])
    codes, scale = (part.transpose(stored).transpose(order) for part in (x.codes, scale))
    scale = jnp.broadcast_to(scale, (*codes.shape[:-1], scale.shape[-1]))
    codes, scale = (part.reshape(-1, part.shape[-1]) for part in (codes, scale))
    return QArray(
        codes=codes,
        scale=scale,
        zero_point=None,
        scheme=dataclasses.replace(x.scheme, scale=FLOAT32, range=AbsMax()),
        layout=CANONICAL,
        dtype=x.dtype,
        ragged=short_tiles(codes.shape, (1, x.tile[summed])),
    )


def scale_per_output(q: QArray, outputs_first: bool) -> Array:
    """The scales `[groups, n]` in float32, as kernels read them where the stored ones do not do.

    One row a group along `k`; one entry an output, whatever the tile along `n` is.
    """
    contracted = [outputs_first is False, outputs_first is True]
    scale = kept_scale(q, contracted)
    if outputs_first:
        scale = scale.T
    return jnp.broadcast_to(scale, (scale.shape[0], q.stored_shape[0 if outputs_first else 1]))
