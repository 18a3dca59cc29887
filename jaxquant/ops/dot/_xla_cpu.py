"""Forms of the dot that XLA's CPU compiler makes fast. Measured in `experiments/cpu_dot`.

CPUs multiply small integers several times faster than floats (VNNI, AMX), but XLA's CPU compiler
reaches those instructions only by `int8 x int8 -> int32` products of several rows, and it converts
codes to floats slowly. Hence three forms, all on weights stored with their contracted axes last:

- *digits*: weight-only, few rows. Each row of activations is written in fixed point, 32 bits of its
  peak, as four signed base-256 digits; `x w = sum_i 256^-i (digit_i w)` is one integer product of
  four times the rows. The fixed point's step is 2^-31 of the row's peak, so that what a float32 sum
  of the row could resolve is kept even where one outlier meets a weight of 0.
  For groups, each group's digits stand in rows of their own, with zeros elsewhere.
- *integer*, for a single row: the row is repeated, since a product of one row does not reach VNNI.
- *fp8*: both sides become bfloat16, which holds every 8-bit float exactly, and are summed in
  float32.

The first is linear in `x` up to rounding, and is differentiated as the linear map that it stands
for.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

from ...numerics import BFLOAT16, peak
from ...qarray import CANONICAL, Layout, QArray
from ...qarray._layout import order_of
from ...qarray._qarray import scale_values, spread
from ...qarray._reshape import flat_tile
from .._factors import fits_int8, refuses_centered, refuses_sum, stored_factors
from ._call import DotCall
from ._split import narrow, scaled_sums

DIGITS = 4
# Beyond so many rows of digits, one float32 product of dequantized weights is as fast.
MOST_DIGIT_ROWS = 512
# A product of fewer rows than this is compiled to scalar loops.
FEWEST_ROWS = 4


def refuses(call: DotCall) -> str | None:
    """Why not, or `None`."""
    if call.platform != "cpu":
        return f"it is for CPUs, and this is a {call.platform}"
    left, right = isinstance(call.lhs, QArray), isinstance(call.rhs, QArray)
    reason = refuses_centered(*(x for x in (call.lhs, call.rhs) if isinstance(x, QArray)))
    if reason is not None:
        return reason
    if left and right:
        return _refuses_codes(call)
    return _refuses_weight(call if right else call.flipped)


def _refuses_codes(call: DotCall) -> str | None:
    formats = (call.lhs.scheme.values, call.rhs.scheme.values)
    if not any(f.integer for f in formats):
        if narrow(call):
            return "with narrow tiles floats are dequantized, which is the general form"
        if all(f.exact_in(BFLOAT16.storage) for f in formats):
            return None
        return f"bfloat16 does not hold every value of {formats}"
    if not all(f.integer for f in formats):
        return f"it multiplies integers with integers and floats with floats, not {formats}"
    if call.batch[0] or call.rows(0) != 1 or not call.free(0):
        return "only products of one row gain by being repeated"
    if any(x.zero_point is not None for x in (call.lhs, call.rhs)):
        return "zero points are left to the general form"
    return None


def _refuses_weight(call: DotCall) -> str | None:
    w = call.rhs
    if not w.scheme.values.integer:
        return f"digits multiply integers, not {w.scheme.values}"
    if call.batch[0]:
        return "the weight has batch axes"
    if call.lhs.dtype not in (jnp.float32, jnp.bfloat16):
        return f"activations are {call.lhs.dtype}, not float32 or bfloat16"
    if not fits_int8(w):
        return f"{w.scheme.values} less its zero point does not fit int8"
    if w.ragged:
        return "some tiles are shorter than others"
    order = w.layout.permutation(w.ndim)
    count = len(call.contracted[1])
    if order[w.ndim - count :] != tuple(sorted(call.contracted[1])) or not count:
        return "the contracted axes are not stored last; `jaxquant.prepare` puts them there"
    sizes, tiles = w.stored_shape[w.ndim - count :], w.stored_tile[w.ndim - count :]
    if flat_tile(sizes, tiles) is None:
        return f"tiles of {tiles} are no runs of neighbours along contracted axes of {sizes}"
    k = int(np.prod(w.stored_shape[w.ndim - count :]))
    # A digit is an int8 too.
    reason = refuses_sum(k)
    if reason is not None:
        return reason
    rows = DIGITS * call.rows(0) * _groups(w, count)
    if rows > MOST_DIGIT_ROWS:
        return f"{rows} rows of digits are no faster than float32 (more than {MOST_DIGIT_ROWS})"
    return None


def _groups(w: QArray, count: int) -> int:
    return int(np.prod(w.scale.shape[w.ndim - count :]))


def run(call: DotCall) -> Float[Array, "..."]:
    """The product, by the form that the operands call for."""
    left, right = isinstance(call.lhs, QArray), isinstance(call.rhs, QArray)
    if left and right:
        if call.lhs.scheme.values.integer:
            return _one_row(call)
        return scaled_sums(call, (jnp.bfloat16, jnp.bfloat16), jnp.float32)
    if right:
        return _weight_only(call)
    y = _weight_only(call.flipped)
    first = len(call.free(1))
    return y.transpose([*range(first, y.ndim), *range(first)])


def _one_row(call: DotCall) -> Float[Array, "..."]:
    axis = call.free(0)[0]
    stored = call.lhs.layout.permutation(call.lhs.ndim).index(axis)

    def repeated(part: Array) -> Array:
        shape = (*part.shape[:stored], FEWEST_ROWS, *part.shape[stored + 1 :])
        return jnp.broadcast_to(part, shape)

    # Without the barrier XLA takes the rows apart again, or computes the codes once for each.
    lhs, rhs = lax.optimization_barrier((jax.tree.map(repeated, call.lhs), call.rhs))
    repeated_call = dataclasses.replace(call, lhs=lhs, rhs=rhs)
    y = scaled_sums(repeated_call, (jnp.int8, jnp.int8), jnp.int32)
    return lax.slice_in_dim(y, 0, 1, axis=0)


def _weight_only(call: DotCall) -> Float[Array, "..."]:
    """`[free of x..., free of w...]`, the weight being on the right."""
    x, w = call.lhs, call.rhs
    # The axes of x that are summed, in the order in which the weight stores their partners.
    pairs = sorted(zip(call.contracted[1], call.contracted[0], strict=True))
    free = call.free(0)
    count = len(pairs)
    k = int(np.prod(w.stored_shape[w.ndim - count :]))
    rows = x.transpose([*free, *(axis for _, axis in pairs)]).reshape(-1, k).astype(jnp.float32)
    codes = stored_factors(w, jnp.int8)
    kept = w.stored_shape[: w.ndim - count]
    shape = (*kept, *w.scale.shape[len(kept) :])
    tile = tuple(1 if i >= len(kept) else t for i, t in enumerate(w.stored_tile))
    scale = spread(scale_values(w), tile, shape).reshape(int(np.prod(kept)), -1)
    y = digits_product(rows, codes.reshape(-1, k), scale)
    order = w.layout.permutation(w.ndim)[: len(kept)]
    y = y.reshape(*(x.shape[a] for a in free), *kept)
    back = [len(free) + order.index(a) for a in call.free(1)]
    return y.transpose([*range(len(free)), *back]).astype(call.out_dtype)


@jax.custom_jvp
def digits_product(
    x: Float[Array, "rows k"], codes: Int8[Array, "n k"], scale: Float[Array, "n groups"]
) -> Float[Array, "rows n"]:
    """`x @ (codes * scale).T` with the activations as base-256 digits."""
    rows, k = x.shape
    n, groups = scale.shape
    digits, step = digits_of(x)
    tile = k // groups
    if groups > 1:
        own = jnp.eye(groups, dtype=bool)[None, None, :, :, None]
        spread_out = digits.reshape(DIGITS, rows, 1, groups, tile)
        digits = jnp.where(own, spread_out, jnp.zeros_like(spread_out))
    # Without the barriers XLA fuses the digits, or the unpacking, into slow scalar products.
    digits, codes = lax.optimization_barrier((digits.reshape(-1, k), codes))
    sums = lax.dot_general(
        digits, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    parts = sums.reshape(DIGITS, rows, groups, n).astype(jnp.float32)
    weighted = parts[0]
    for i in range(1, DIGITS):
        weighted = weighted + parts[i] * np.float32(256.0**-i)
    return (weighted * scale.T[None]).sum(axis=1) * step


def digits_of(
    x: Float[Array, "rows k"],
) -> tuple[Int8[Array, "digits rows k"], Float[Array, "rows 1"]]:
    """Digits `d` and a step `s` for each row such that `x = s sum_i d_i 256^-i`.

    A row with NaN or infinity has a step of NaN or infinity, and so a result of NaN.
    """
    highest = peak(x, axis=-1)
    # Products with reciprocals, as XLA makes some of the divisions by a broadcast into these and
    # others not. The floor keeps the reciprocal finite for rows of zeros or of nearly that.
    step = jnp.maximum(highest * np.float32(1 / 127), np.float32(2.0**-100))
    scale = np.float32(256.0 ** (DIGITS - 1)) / step
    fixed = jnp.round(x * scale).astype(jnp.int32)
    # Adding 128 to each digit makes all of them non-negative, so that none borrows from the next.
    shifted = lax.optimization_barrier(fixed + np.uint32(0x80808080).astype(np.int32))
    shifts = jnp.asarray([8 * (DIGITS - 1 - i) for i in range(DIGITS)], jnp.int32)
    wide = (DIGITS, *x.shape)
    digits = lax.shift_right_logical(
        jnp.broadcast_to(shifted[None], wide), jnp.broadcast_to(shifts[:, None, None], wide)
    )
    # Flipping the top bit of a byte takes the 128 off again.
    return (digits ^ np.int32(0x80)).astype(jnp.int8), step


@digits_product.defjvp
def _digits_product_jvp(primals: Any, tangents: Any) -> Any:
    def linear(x: Any, codes: Any, scale: Any) -> Any:
        n, groups = scale.shape
        wide = codes.astype(jnp.float32).reshape(n, groups, -1) * scale[:, :, None]
        return lax.dot_general(x, wide.reshape(n, -1), (((1,), (1,)), ((), ())))

    _, moved = jax.jvp(linear, primals, tangents)
    return digits_product(*primals), moved


def layout_for(w: QArray, contracted: tuple[int, ...], stack: tuple[int, ...]) -> Layout:
    """The layout that this backend reads: stack axes, then kept, then contracted; codes as int8.

    What does not hold integers, or not in tiles of one size, is left as it is.
    """
    if not w.scheme.values.integer or w.ragged:
        return CANONICAL
    kept = tuple(a for a in range(w.ndim) if a not in contracted and a not in stack)
    order = order_of((*stack, *kept, *contracted))
    return Layout(order=order, wide=w.scheme.values.bits < 8)
