"""Two products: of codes, and of the columns that are kept apart.

These are multiplied in the dtype of the activations (in float32 on CPUs, whose compiler lacks some
products of bfloat16), with sums in float32, in one of two forms:
- *mask*: all columns, with zeros in place of those that were rounded. Right for any number.
- *gather*: at most `Outliers.columns` of them, in arrays of that size. Where there are more, which
  shows only when the product is computed, it is the mask.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ...qarray import dequantize, QArray
from .._activations import quantize_activation
from ..dot import dot_general
from ..take import gather
from ._call import OutlierCall


def refuses(call: OutlierCall) -> str | None:
    """It takes every call; the product of codes is `dot_general`'s own affair."""
    return None


def run(call: OutlierCall) -> Float[Array, "..."]:
    """The product, by the form that the outliers and the axes name."""
    x, side = call.x, call.side
    big = call.big()
    apart = call.in_columns(big)
    q = quantize_activation(
        jnp.where(big, jnp.zeros((), x.dtype), x),
        call.activations,
        contracted=call.dot.contracted[side],
        stack=call.dot.batch[side],
    )
    codes = jnp.where(apart, jnp.zeros((), q.codes.dtype), q.codes)
    below = call.with_sides(dataclasses.replace(q, codes=codes), call.w)
    y = dot_general(
        below.lhs,
        below.rhs,
        below.dimension_numbers,
        precision=call.dot.precision,
        out_dtype=jnp.float32,
    )
    if call.columns is not None:
        known = call.known()
        y = y + _known(call, jnp.where(apart & known, x, jnp.zeros((), x.dtype)))
        apart = apart & jnp.logical_not(known)
    return (y + _unknown(call, apart)).astype(call.dot.out_dtype)


def _dtype(call: OutlierCall) -> Any:
    return jnp.float32 if call.dot.platform == "cpu" else call.x.dtype


def _known(call: OutlierCall, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The product of columns whose original weights are known."""
    rows = call.rows(x)
    index = jnp.broadcast_to(call.columns[..., None, :], (*rows.shape[:-1], call.columns.shape[-1]))
    chosen = jnp.take_along_axis(rows, index, axis=-1, mode="fill", fill_value=0)
    y = jnp.matmul(
        chosen.astype(_dtype(call)),
        call.originals.astype(_dtype(call)),
        precision=call.dot.precision,
        preferred_element_type=jnp.float32,
    )
    return call.as_result(y)


def _unknown(call: OutlierCall, apart: Bool[Array, "..."]) -> Float[Array, "..."]:
    """The product of the columns `apart` with what the codes of the weight stand for."""
    k, most = call.sizes[1], call.outliers.columns
    if most is None or most >= k or not gathers(call):
        return _masked(call, apart)
    return lax.cond(
        apart.sum(dtype=jnp.int32) <= most,
        lambda apart: _gathered(call, apart, most),
        lambda apart: _masked(call, apart),
        apart,
    )


def gathers(call: OutlierCall) -> bool:
    """Whether columns can be gathered: one axis is summed, and none batched."""
    return len(call.dot.contracted[0]) == 1 and not call.dot.batch[0]


def _masked(call: OutlierCall, apart: Bool[Array, "..."]) -> Float[Array, "..."]:
    x = jnp.where(apart, call.x, jnp.zeros((), call.x.dtype)).astype(_dtype(call))
    dot = call.with_sides(x, dequantize(call.w, x.dtype))
    return lax.dot_general(
        dot.lhs,
        dot.rhs,
        dot.dimension_numbers,
        precision=dot.precision,
        preferred_element_type=jnp.float32,
    )


def _gathered(call: OutlierCall, apart: Bool[Array, "..."], most: int) -> Float[Array, "..."]:
    """`most` columns, of which those that are not `apart` are 0."""
    chosen, index = lax.top_k(apart.reshape(-1).astype(jnp.float32), most)
    rows = jnp.take(call.rows(call.x), index, axis=-1, mode="clip")
    rows = jnp.where(chosen[None] > 0, rows, jnp.zeros((), rows.dtype))
    (axis,) = call.dot.contracted[1 - call.side]
    weights = _slices(call.w, axis, index).astype(_dtype(call))
    y = jnp.matmul(
        rows.astype(_dtype(call)),
        weights.reshape(most, -1),
        precision=call.dot.precision,
        preferred_element_type=jnp.float32,
    )
    return call.as_result(y)


def _slices(w: QArray, axis: int, index: Array) -> Float[Array, "m ..."]:
    """What the codes stand for at the places `index` of an axis, which comes first."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, w.ndim)),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
    )
    sizes = tuple(1 if a == axis else n for a, n in enumerate(w.shape))
    return gather(
        w,
        index[:, None],
        dimension_numbers=numbers,
        slice_sizes=sizes,
        mode="promise_in_bounds",
    )
