"""The dot on TPU where both sides are quantized, or the plain one is to be rounded first.

Which calls the kernel of `_mosaic_tpu_codes.py` takes, how each generation multiplies their codes,
and in what blocks.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ...numerics import AbsMax, Convention, E4M3, E5M2, FLOAT32, Format
from ...qarray import QArray, Scheme
from ...qarray._qarray import scale_values
from ...qarray._scheme import tile_shape
from .._activations import undifferentiated
from .._factors import common_tile, kept_scale, refuses_codes, refuses_sum
from . import _mosaic_tpu_tables as tables
from ._call import DotCall, Layer
from ._gemm import as_gemm, outputs_first, scale_per_output, weight_side
from ._grad import product
from ._mosaic_tpu_codes import CodeBlocks, codes_product, Feed, Pair
from ._mosaic_tpu_round import Rounding
from ._partition import Cut, cut_of, dealt_out, local_activations, local_weight

_FLOATS = (E4M3, E5M2)
# Products of two int8 that float32 sums exactly: 128 * 128 * 1024 = 2^24.
_EXACT_PRODUCTS = 1024
_LANES = 128


def refuses(call: DotCall) -> str | None:
    """Why not, or `None`: for a call that is a product of rows by a stored matrix."""
    side = weight_side(call)
    assert side is not None
    if call.activations is not None:
        reason = refuses_rounding(call)
        if reason is not None:
            return reason
    sides = call.rounded_shapes()
    x, w = (sides.lhs, sides.rhs)[1 - side], (sides.lhs, sides.rhs)[side]
    axis = call.contracted[1 - side][0]
    reason = _refuses_sides(x, w)
    if reason is None and outputs_first(call):
        reason = "the weight is stored by output; `jaxquant.prepare` stores it by input"
    if reason is None:
        reason = refuses_sum(x.shape[axis])
    if reason is not None:
        return reason
    cut = cut_of(call)
    if isinstance(cut, str):
        return cut
    rows, x_tile = call.rows(1 - side), x.tile[axis]
    if cut is not None:
        w = local_weight(w, cut, call.contracted[side][0])
        if isinstance(w, str):
            return w
        rows //= cut.count(cut.rows)
        x_tile = local_activations(x_tile, x.shape[axis], cut)
    generation = tables.generation(call)
    pair = _pair(w, x.scheme.values, x_tile, generation, None)
    if isinstance(pair, str):
        return pair
    blocks = code_blocks(rows, pair, generation)
    return blocks if isinstance(blocks, str) else None


def _refuses_sides(x: QArray, w: QArray) -> str | None:
    reason = refuses_codes(x, w)
    if reason is not None:
        return reason
    for q in (x, w):
        if q.zero_point is not None:
            return "sums of codes with zero points are not computed"
        if isinstance(q.scheme.scale, Scheme):
            return "scales that are held as codes are not read"
        if q.layout.packed is not None or q.layout.wide:
            return "codes of both sides are read unpacked, in their own dtype"
        values = q.scheme.values
        if not values.integer and values not in _FLOATS or values.storage.kind == "b":
            return f"there is no product of codes of {values} by codes"
    return None


def refuses_rounding(call: DotCall) -> str | None:
    """Why the kernel cannot round the plain side to `call.activations` by itself, or `None`."""
    scheme, side = call.activations, weight_side(call)
    assert scheme is not None and side is not None
    x = (call.lhs, call.rhs)[1 - side]
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"activations are {x.dtype}, not float32 or bfloat16"
    if scheme.zero_point is not None or scheme.scale != FLOAT32 or scheme.centered:
        return f"rounding to {scheme} is not done inside the product"
    rule = scheme.range
    if not isinstance(rule, AbsMax) or rule.convention is Convention.SIGNED:
        return f"ranges of {rule} are not found inside the product"
    k = x.shape[call.contracted[1 - side][0]]
    if scheme.tile.kept != 1 and call.rows(1 - side) != 1:
        return "rows that share a scale are not rounded inside the product"
    if scheme.tile.contracted not in (None, k) and scheme.tile.contracted % _LANES:
        return f"tiles of {scheme.tile.contracted} are not rounded inside the product"
    cut = cut_of(call)
    if isinstance(cut, Cut) and cut.k:
        return "the rows lie on several devices, and are rounded before they are multiplied"
    return None


def loses(call: DotCall) -> str | None:
    """Why XLA is as fast though the kernel would take the call, or `None`."""
    side = weight_side(call)
    assert side is not None
    w = (call.lhs, call.rhs)[side]
    generation, rows = tables.generation(call), call.rows(1 - side)
    most = tables.most_rows_of_codes(generation, w.scheme.values)
    if most is not None and rows > most:
        return (
            f"on TPU generation {generation} the product of codes by {w.scheme.values} is "
            f"scheduled to win up to {most} rows, and there are {rows}"
        )
    return None


def run(call: DotCall) -> Float[Array, "..."]:
    """The product, by the kernel."""
    gemm, cut, side = as_gemm(call), cut_of(call), weight_side(call)
    assert side is not None and not isinstance(cut, str)
    summed, x = call.contracted[side][0], gemm.x
    if call.activations is not None:
        x = undifferentiated(x, call.activations)
    multiply = functools.partial(
        _multiply,
        rounded=call.activations,
        generation=tables.generation(call),
        cores=call.device.cores,
        interpret=call.interpret,
    )
    if cut is None:

        def kernel(x: Any, w: QArray, *layer: Layer) -> Array:
            return multiply(x, w, call.out_dtype, *layer)
    else:
        kernel = dealt_out(multiply, cut, summed, call.out_dtype)
    return gemm.finish(
        product(
            kernel,
            x,
            gemm.w,
            call.layer if _stacks(call.layer, gemm.w) else None,
            summed=summed,
            precision=call.precision,
            activations=call.activations,
        )
    )


def _stacks(layer: Layer | None, w: QArray) -> bool:
    """Whether the codes of a weight can be read where they lie in a stack."""
    if layer is None:
        return False
    stack = layer.stack
    return stack.layout == w.layout and stack.codes.shape[1:] == w.codes.shape


def _multiply(
    x: Any,
    w: QArray,
    out_dtype: Any,
    layer: Layer | None = None,
    *,
    rounded: Scheme | None,
    generation: int,
    cores: int,
    interpret: bool,
) -> Float[Array, "rows n"]:
    plain = not isinstance(x, QArray)
    if plain:
        assert rounded is not None
        values = rounded.values
        tile = tile_shape(x.shape, rounded.tile, contracted=(1,))[1]
    else:
        values, tile = x.scheme.values, x.tile[1]
    pair = _pair(w, values, tile, generation, rounded if plain else None)
    assert not isinstance(pair, str)
    blocks = code_blocks(x.shape[0], pair, generation, cores, x.dtype.itemsize)
    assert not isinstance(blocks, str)
    x_scale = None
    if not plain:
        x, x_scale = x.codes, scale_per_row(x)
    return codes_product(
        x,
        x_scale,
        w.codes if layer is None else layer.stack.codes,
        scale_per_tile(w, blocks.n) if pair.tiled else scale_per_output(w, outputs_first=False),
        None,
        pair=pair,
        blocks=blocks,
        out_dtype=out_dtype,
        layer=None if layer is None else layer.index,
        interpret=interpret,
    )


def scale_per_row(x: QArray) -> Float[Array, "rows tiles"]:
    """The scales of activations of two axes in float32, one for each row and tile along `k`."""
    scale = kept_scale(x, [False, True])
    return jnp.broadcast_to(scale, (x.shape[0], scale.shape[1]))


def scale_per_tile(w: QArray, columns: int) -> Float[Array, "steps groups tiles"]:
    """The scales in float32, one for 128 columns, by steps of so many columns."""
    scale = jnp.repeat(scale_values(w), w.stored_tile[1] // _LANES, axis=1)
    tiles, steps = -(-columns // _LANES), -(-w.stored_shape[1] // columns)
    scale = scale[:, : tiles * steps]
    scale = jnp.pad(scale, ((0, 0), (0, tiles * steps - scale.shape[1])))
    return scale.reshape(-1, steps, tiles).transpose(1, 0, 2)


def _pair(
    w: QArray, left: Format, left_tile: int, generation: int, rounded: Scheme | None
) -> Pair | str:
    """How a product is computed, or why it is not; `w` is one device's weight, as it is stored."""
    k, n = w.stored_shape
    right, right_tile = w.scheme.values, w.stored_tile[0]
    group = common_tile(k, left_tile, right_tile)
    if group != k and group % _LANES:
        return f"scales for every {group} along {k} are finer than the {_LANES} that are summed"
    dtype, feed = _factors(left, right, k, generation)
    rounding = None
    if rounded is not None:
        assert isinstance(rounded.range, AbsMax)
        highest = {
            Convention.HIGHEST: left.highest,
            Convention.MIDDLE: (left.highest - left.lowest) / 2,
            Convention.LOWEST: -left.lowest,
        }[rounded.range.convention]
        rounding = Rounding(format=left, factor=1 / highest, group=left_tile)
    return Pair(
        k=k,
        n=n,
        group=group,
        left_group=left_tile,
        right_group=right_tile,
        integer=left.integer,
        left=np.dtype(dtype),
        right=feed,
        longest=_EXACT_PRODUCTS if left.integer and dtype == jnp.bfloat16 else k,
        tiled=w.stored_tile[1] % _LANES == 0,
        rounding=rounding,
    )


def _factors(left: Format, right: Format, k: int, generation: int) -> tuple[Any, Feed]:
    """In which dtype the left side is multiplied, and how the right one is fed."""
    if left.integer:
        if generation not in tables.MULTIPLIES_INT8:
            return jnp.bfloat16, Feed.BFLOAT16
        return jnp.int8, Feed.STORED if right.storage == np.int8 else Feed.INT8
    if generation in tables.MULTIPLIES_E4M3:
        return left.storage, Feed.STORED
    # Words hold four rows; registers of bytes, 32.
    if right == E4M3 and generation in tables.MULTIPLIES_E4M3_BIAS_11 and k % 32 == 0:
        return jnp.bfloat16, Feed.BIAS_11
    return jnp.bfloat16, Feed.BFLOAT16


_WIDEST = 1024
_CODE_BYTES = 2**21
_LONGEST = 8192
_LONGEST_WHOLE = 16384
_ROWS = (512, 256, 128, 64, 32)


def code_blocks(
    rows: int, pair: Pair, generation: int, cores: int = 1, plain_bytes: int = 4
) -> CodeBlocks | str:
    """The blocks for a product, or why there are none.

    `plain_bytes` is the size of an element of activations that are rounded in the kernel.
    """
    most, limit = tables.VECTOR_MEMORY[generation]
    k = _length(pair)
    if k is None:
        return f"no blocks along {pair.k} fit into a core's memory"
    n = 2 ** math.floor(math.log2(_CODE_BYTES / k))
    n = min(max(_LANES, min(n, _WIDEST)), pair.n)
    for size in _ROWS:
        if size > tables.MOST_ROWS_AT_ONCE[generation]:
            continue
        blocks = CodeBlocks(rows=min(rows, size), k=k, n=n, vmem=limit)
        if _bytes(blocks, pair, plain_bytes) <= most:
            steps = -(-pair.n // n)
            return dataclasses.replace(blocks, cores=cores if steps % cores == 0 else 1)
    return f"rows of {pair.k} do not fit into a core's memory"


def _length(pair: Pair) -> int | None:
    """The longest good divisor of `k` that holds whole tiles of both sides."""
    if pair.k <= _LONGEST:
        return pair.k
    tiles = [t for t in (pair.left_group, pair.right_group) if t != pair.k]
    step = math.lcm(_LANES, *tiles)
    fitting = [d for d in range(step, _LONGEST + 1, step) if pair.k % d == 0]
    if not fitting or fitting[-1] < 1024:
        return pair.k if pair.k <= _LONGEST_WHOLE else max(fitting, default=None)
    return fitting[-1]


def _bytes(blocks: CodeBlocks, pair: Pair, plain_bytes: int) -> int:
    """About what a step takes of a core's memory, with blocks of which two are there at a time."""
    rows, k, n = blocks.rows, blocks.k, blocks.n
    left = 2 * rows * (plain_bytes * pair.k if pair.rounding else k)
    kept = rows * pair.k * pair.left.itemsize
    sums = rows * n * 4 * (2 + 2 * pair.grouped + (k != pair.k))
    return 2 * k * n + left + kept + sums + 2 * rows * n * 4
