"""Codes by codes on Hopper: `int8 x int8 -> int32`, `fp8 x fp8 -> float32`, scaled after the sum.

Both sides go from memory to shared memory as they are, several steps ahead, and from there to the
tensor cores; outputs are the rows of their tiles and rows of activations the columns, of which
there may be few. Where scales are by groups along `k` (1 x 128 of activations by 128 x 128 of the
weight: DeepSeek-V3 technical report, arXiv:2412.19437, section 3.3.2), the sum of a step, which
lies in one group of each, is scaled in float32; that also bounds how long a sum the tensor cores
keep.

Of Hopper's own instructions for fp8 Triton uses none where sums are to be float32, which those keep
in fewer bits, and Pallas has no way to ask for them: fp8 becomes float16, exactly, on its way to
the tensor cores, at half the rate. That is enough for few rows, which wait for memory.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .._pallas import ds, gpu_call, gpu_load, gpu_store, program_id


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodesProblem:
    """What the kernel is compiled for.

    `tile` is how many rows and columns of the weight share a scale, `group` how many neighbours of
    a row of activations do; `step` how many along `k` a step takes. A block makes `row_tile` by
    `outputs` sums, `splits` of them each a part of `k`.
    """

    rows: int
    n: int
    k: int
    tile: tuple[int, int]
    group: int
    integer: bool
    out_dtype: np.dtype
    step: int
    row_tile: int
    outputs: int
    splits: int
    warps: int
    stages: int
    interpret: bool

    @property
    def grouped(self) -> bool:
        return min(self.group, self.tile[1]) < self.k

    @property
    def steps(self) -> int:
        return -(-self.k // self.step)


def widest_step(k: int, *groups: int) -> int:
    """How many along `k` a step may take: 128 where each group is of a multiple of that."""
    return math.gcd(128, *(g for g in groups if g < k))


def codes_by_codes(
    problem: CodesProblem, x: Any, x_scale: Any, w: Any, w_scale: Any, poison: Any = None
) -> Float[Array, "rows n"]:
    """`x [rows, k]` by `w [n, k]`; scales `[rows, groups]` and `[n / tile, k / tile]`.

    `poison` is what the result's memory holds before: `[splits, rows, n]`.
    """
    p = problem
    # Integer sums stay exact over splits: they are scaled once they are complete.
    raw = p.splits > 1 and not p.grouped
    whole = p.splits == 1
    dtype = p.out_dtype if whole else jnp.int32 if raw and p.integer else jnp.float32
    args = [x, w, x_scale, w_scale]
    if poison is not None:
        args.append(poison)
    y = gpu_call(
        partial(_kernel, p, raw),
        name="int8_by_int8" if p.integer else "fp8_by_fp8",
        grid=(-(-p.n // p.outputs), p.splits, -(-p.rows // p.row_tile)),
        out_shape=jax.ShapeDtypeStruct((p.splits, p.rows, p.n), dtype),
        warps=p.warps,
        stages=p.stages,
        interpret=p.interpret,
        in_out=None if poison is None else {len(args) - 1: 0},
    )(*args)
    if whole:
        return y[0]
    y = y.sum(axis=0)
    if raw:
        per_output = jnp.repeat(w_scale[:, 0], p.tile[0])[: p.n]
        y = y.astype(jnp.float32) * x_scale.astype(jnp.float32)
        y = y * per_output.astype(jnp.float32)[None, :]
    return y.astype(p.out_dtype)


def _kernel(p: CodesProblem, raw: bool, x: Any, w: Any, x_scale: Any, w_scale: Any, *refs: Any):
    o_ref = refs[-1]
    row, output = program_id(2) * p.row_tile, program_id(0) * p.outputs
    rows, outputs = row + jnp.arange(p.row_tile), output + jnp.arange(p.outputs)
    within = jnp.minimum(outputs, p.n - 1) // p.tile[0]
    steps = p.steps // p.splits
    first = program_id(1) * steps
    sum_dtype = jnp.int32 if p.integer else jnp.float32

    def load(ref: Any, start: Any, size: int, limit: int, k: Any) -> Array:
        shape = (size, p.step)
        mask = None
        if limit % size:
            mask = jnp.broadcast_to((start + jnp.arange(size) < limit)[:, None], shape)
        if p.k % p.step:
            columns = jnp.broadcast_to((k + jnp.arange(p.step) < p.k)[None, :], shape)
            mask = columns if mask is None else mask & columns
        there = ref.at[ds(start, size), ds(k, p.step)]
        return gpu_load(there) if mask is None else gpu_load(there, mask=mask, other=_zero(ref))

    def scale(sums: Array, k: Any) -> Array:
        there = jnp.minimum(k // p.tile[1], w_scale.shape[1] - 1)
        token = gpu_load(
            x_scale.at[
                jnp.minimum(rows, p.rows - 1), jnp.minimum(k // p.group, x_scale.shape[1] - 1)
            ]
        )
        sums, token = sums.astype(jnp.float32), token.astype(jnp.float32)[None, :]
        if p.tile[0] % p.outputs == 0:
            # All outputs of this block share the weight's scale.
            own = gpu_load(w_scale.at[output // p.tile[0], there])
            return sums * (token * own.astype(jnp.float32))
        own = gpu_load(w_scale.at[within, there])
        return sums * token * own.astype(jnp.float32)[:, None]

    def body(i: Any, sums: Array) -> Array:
        k = (first + i) * p.step
        left = load(w, output, p.outputs, p.n, k)
        right = load(x, row, p.row_tile, p.rows, k)
        part = _product(left, right, sum_dtype, p.interpret)
        return sums + (scale(part, k) if p.grouped else part)

    start = jnp.zeros((p.outputs, p.row_tile), jnp.float32 if p.grouped else sum_dtype)
    sums = lax.fori_loop(0, steps, body, start)
    if not p.grouped and not raw:
        sums = scale(sums, 0)
    gpu_store(
        o_ref.at[program_id(1), ds(row, p.row_tile), ds(output, p.outputs)],
        sums.T.astype(o_ref.dtype),
        mask=(rows < p.rows)[:, None] & (outputs < p.n)[None, :],
    )


def _zero(ref: Any) -> Array:
    return jnp.zeros((), ref.dtype)


def _product(left: Array, right: Array, dtype: Any, interpret: bool) -> Array:
    if interpret:
        # XLA's CPU compiler lacks products of some of these dtypes; wider ones hold them exactly.
        left, right = left.astype(dtype), right.astype(dtype)
        return lax.dot_general(
            left, right, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )
    return lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
