"""Kernels for NVIDIA GPUs of the Hopper generation, written with Pallas and Triton."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ...numerics import E4M3, E5M2, Format, INT8
from ...qarray import CANONICAL, Layout, QArray
from ...qarray._layout import order_of
from ...qarray._qarray import scale_values
from .._factors import kept_scale, refuses_sum
from . import _triton_gpu_tables as tables
from ._call import DotCall
from ._gemm import as_gemm, outputs_first, refuses_shape, weight_side
from ._grad import product
from ._partition import cut_of, dealt_out, local_weight
from ._triton_gpu_codes import codes_by_codes, CodesProblem, widest_step
from ._triton_gpu_decode import refuses_format, runs
from ._triton_gpu_weight import least_unit, Problem, Tiling, weight_only

PREPARE = "`jaxquant.prepare` stores it as it is read here"
# The tensor cores take 32 bytes along the summed axis at once.
LEAST_STEP = 32


def refuses(call: DotCall) -> str | None:
    """Why not, or `None`."""
    if call.platform != "cuda" and not call.interpret:
        return f"it is for NVIDIA GPUs, and this is a {call.platform}"
    reason = refuses_shape(call)
    if reason is not None:
        return reason
    turned = call if weight_side(call) == 1 else call.flipped
    if isinstance(turned.lhs, QArray):
        return _refuses_codes(turned)
    if turned.lhs.dtype not in (jnp.float32, jnp.bfloat16):
        return f"activations are {turned.lhs.dtype}, not float32 or bfloat16"
    reason = _refuses_weight(turned) or _refuses_layout(turned.rhs, outputs_first(call))
    if reason is not None:
        return reason
    cut = cut_of(turned)
    if cut is None or isinstance(cut, str):
        return cut
    local = local_weight(turned.rhs, cut, turned.contracted[1][0])
    return local if isinstance(local, str) else _refuses_layout(local, True)


def loses(call: DotCall) -> str | None:
    """Why XLA is as fast though a kernel would take the call, or `None`."""
    if call.interpret:
        return None
    turned = call if weight_side(call) == 1 else call.flipped
    rows = turned.rows(0)
    if isinstance(turned.lhs, QArray):
        if rows > tables.MOST_ROWS_CODES:
            return (
                f"XLA multiplies {rows} rows of codes at the full rate (more than "
                f"{tables.MOST_ROWS_CODES})"
            )
    elif rows > tables.MOST_ROWS:
        return (
            f"{rows} rows are worth a product of XLA on the dequantized weight (more than "
            f"{tables.MOST_ROWS})"
        )
    return None


def _refuses_codes(call: DotCall) -> str | None:
    x, w = call.lhs, call.rhs
    formats = x.scheme.values, w.scheme.values
    if formats[0] != formats[1] or formats[0] not in (INT8, E4M3, E5M2):
        return f"it multiplies int8, or 8-bit floats, with their own kind, not {formats}"
    if any(q.zero_point is not None or q.offset is not None for q in (x, w)):
        return "zero points and offsets are left to the general form"
    if 0 in w.shape or call.rows(0) == 0:
        return "there is nothing to multiply"
    if cut_of(call) is not None:
        return "activations that are codes are not dealt out over devices"
    if not outputs_first(call):
        return f"the summed axis of the weight is not stored last; {PREPARE}"
    (left,), (right,) = call.contracted
    k, tiles = w.shape[right], (x.tile[left], w.tile[right])
    step = widest_step(k, *tiles)
    if step < LEAST_STEP:
        return f"groups of {tiles} have no {LEAST_STEP} neighbours in common"
    # Of groups each step's sum becomes float32.
    return refuses_sum(k) if formats[0].integer and min(tiles) >= k else None


def _refuses_weight(call: DotCall) -> str | None:
    w = call.rhs
    reason = refuses_format(w.scheme.values)
    if reason is not None:
        return reason
    if w.scheme.real_zero_point:
        return "zero points lie between codes"
    if 0 in w.shape or call.rows(0) == 0:
        return "there is nothing to multiply"
    return None


def _refuses_layout(w: QArray, by_output: bool) -> str | None:
    format, packed, k = w.scheme.values, w.layout.packed, w.stored_shape[1]
    if format.packs and _block(format, w.stored_shape[int(by_output)]) is None:
        return f"an axis of {w.stored_shape[int(by_output)]} codes of {format} fills no tiles"
    if not by_output:
        return f"the summed axis of the weight is not stored last; {PREPARE}"
    if w.layout.wide or format.packs and packed is None:
        return f"codes of {format.bits} bits are not packed into bytes; {PREPARE}"
    if k % (packed or k) or _size(format, packed or k, k) is None:
        return f"an axis of {k} codes of {format} in blocks of {packed} fills no tiles"
    return None


def run(call: DotCall) -> Float[Array, "..."]:
    """The product, by the variant for the operands' formats."""
    turned = call if weight_side(call) == 1 else call.flipped
    gemm, cut = as_gemm(call), cut_of(call)
    assert not isinstance(cut, str)
    multiply = partial(_multiply, interpret=call.interpret)
    summed = turned.contracted[1][0]
    if cut is None:
        kernel = partial(multiply, out_dtype=call.out_dtype)
    else:
        kernel = dealt_out(multiply, cut, summed, call.out_dtype)
    return gemm.finish(product(kernel, gemm.x, gemm.w, summed=summed, precision=call.precision))


def _multiply(
    x: Float[Array, "rows k"] | QArray, w: QArray, out_dtype: Any, *, interpret: bool
) -> Float[Array, "rows n"]:
    if isinstance(x, QArray):
        problem = codes_problem(x, w, out_dtype, interpret)
        return codes_by_codes(problem, x.codes, x.scale, w.codes, scale_values(w))
    return weight_only(weight_problem(x, w, out_dtype, interpret), x, *_parts(w))


def codes_problem(x: QArray, w: QArray, out_dtype: Any, interpret: bool) -> CodesProblem:
    """What the kernel for codes by codes is compiled for: `x [rows, k]`, `w` stored as `[n, k]`."""
    (rows, k), n = x.shape, w.stored_shape[0]
    integer = w.scheme.values.integer
    table = tables.INT8 if integer else tables.FP8
    row_tile = tables.tile_of_rows(rows, table)
    outputs, warps, stages = table[row_tile]
    step = widest_step(k, x.tile[1], w.stored_tile[1])
    blocks = -(-n // outputs) * -(-rows // row_tile)
    return CodesProblem(
        rows=rows,
        n=n,
        k=k,
        tile=(w.stored_tile[0], w.stored_tile[1]),
        group=x.tile[1],
        integer=integer,
        out_dtype=np.dtype(out_dtype),
        step=step,
        row_tile=row_tile,
        outputs=outputs,
        splits=tables.even_splits(blocks, -(-k // step), stages),
        warps=warps,
        stages=stages,
        interpret=interpret,
    )


def weight_problem(x: Any, w: QArray, out_dtype: Any, interpret: bool) -> Problem:
    """What the weight-only kernel is compiled for: `x [rows, k]`, and `w` stored as `[n, k]`."""
    format, group = w.scheme.values, w.stored_tile[1]
    n, k = w.stored_shape
    packed = w.layout.packed or k
    size = _size(format, packed, k)
    assert size is not None
    run = packed // runs(format)
    by_rows = tables.WEIGHT_ONLY[format.bits]
    if x.dtype == jnp.float32:
        by_rows = tables.WEIGHT_ONLY_FLOAT32[format.bits]
    elif format.bits == 4 and run != size:
        by_rows = tables.WEIGHT_ONLY_APART
    elif format.table is not None:
        by_rows = tables.WEIGHT_ONLY_LOOKUP
    rows = tables.tile_of_rows(x.shape[0], by_rows)
    outputs, warps, ahead, stages = by_rows[rows]
    blocks = -(-n // outputs) * -(-x.shape[0] // rows)
    steps = k // packed * -(-run // size)
    splits = tables.splits(blocks, steps, ahead)
    if splits == 1 and by_rows is tables.WEIGHT_ONLY[4]:
        stages = tables.STAGES_WHOLE.get(rows, stages)
    tiling = Tiling(
        rows=rows,
        outputs=outputs,
        size=size,
        packed=packed,
        run=run,
        unit=least_unit(size, group, packed, k, run, runs(format)),
        splits=splits,
        ahead=ahead,
        scales_ahead=rows <= tables.MOST_ROWS_SCALES_AHEAD[runs(format)],
        warps=warps,
        stages=stages,
    )
    return Problem(
        rows=x.shape[0],
        n=n,
        k=k,
        group=group,
        format=format,
        out_dtype=np.dtype(out_dtype),
        tiling=tiling,
        interpret=interpret,
    )


def _size(format: Format, packed: int, k: int) -> int | None:
    """How many bytes of an output a step takes: 16 for each of four threads where that fits."""
    run = packed // runs(format)
    for size in (64, 32, 16):
        if format.bits == 3 and packed // 8 % size:
            continue
        if packed == k and run >= 16 or run % size == 0:
            return size
    return None


def _parts(w: QArray) -> tuple[Any, Any, Any]:
    """Codes as bytes, and scales and zero points `[n, groups]`, as they are where they can be."""
    scale = w.scale
    if isinstance(scale, QArray) or w.stored_tile[0] != 1:
        scale = kept_scale(w, [False, True])
        scale = jnp.broadcast_to(scale, (w.stored_shape[0], scale.shape[1]))
    elif scale.dtype == jnp.float8_e8m0fnu:
        scale = lax.bitcast_convert_type(scale, jnp.uint8)
    elif scale.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        scale = scale.astype(jnp.bfloat16)
    zero = w.zero_point
    if zero is not None:
        zero = zero.astype(jnp.bfloat16)
        if zero.shape[0] != w.stored_shape[0]:
            repeated = jnp.repeat(zero, w.stored_tile[0], axis=0)
            zero = repeated[: w.stored_shape[0]]
    codes = w.codes
    if codes.dtype.itemsize == 1 and codes.dtype not in (jnp.uint8, jnp.int8):
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
    return codes, scale, zero


def layout_for(w: QArray, contracted: tuple[int, ...], stack: tuple[int, ...]) -> Layout:
    """The layout that this backend reads: stack axes, then kept, then contracted; codes packed.

    Codes of less than a byte lie so that the 64 bytes of a step hold neighbours, in runs of 64
    codes, where the axis can be cut so; else the axis is one block. What this backend does not
    read is left as it is.
    """
    format = w.scheme.values
    if len(contracted) != 1 or (refuses_format(format) is not None and format != E5M2):
        return CANONICAL
    kept = tuple(a for a in range(w.ndim) if a not in contracted and a not in stack)
    order = order_of((*stack, *kept, *contracted))
    if not format.packs:
        return Layout(order=order)
    block = _block(format, w.shape[contracted[0]])
    return CANONICAL if block is None else Layout(order=order, packed=block)


def _block(format: Format, k: int) -> int | None:
    """In blocks of how many codes an axis is packed, if it can be."""
    for block in (64 * runs(format) * (2 if format.bits == 3 else 1), k):
        if k % block == 0 and block % 8 == 0 and _size(format, block, k) is not None:
            return block
    return None
