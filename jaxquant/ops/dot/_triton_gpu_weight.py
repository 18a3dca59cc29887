"""Weight-only on Hopper: activations by codes that become bfloat16 in registers.

`y^T = w^T x^T`: outputs are the rows of the tensor cores' tiles, which have 64, and rows of
activations their columns, of which there may be few. Tensor cores take the left side from
registers. So codes never pass through shared memory:

- each thread loads 16 neighbouring bytes of one output, several steps ahead, and decodes them
  (`_triton_gpu_decode`) to where `wgmma` wants its left operand;
- the order of the summed axis that this makes is given to the activations instead, and that of the
  outputs is undone once, at the end.

Sums of a tile that lies in one group are scaled in float32. Where tiles hold several groups, the
weights are scaled before the product: in bfloat16, or, for float32 activations, in float32, as
three bfloat16 numbers whose products with three of each activation are summed.

With fewer blocks than the chip holds at once the summed axis is split over blocks, whose sums are
added in one order by XLA.
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

from ...numerics import Format
from .._pallas import ds, gpu_call, gpu_dot, gpu_load, gpu_store, program_id
from ._triton_gpu_decode import decoded, minus, runs, terms_of, times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a product `[rows, k] x [n, k]` is cut up.

    A block makes `rows x outputs`; a step of it takes `size` bytes of each output, which hold codes
    of as many runs as share a byte, `run` codes long in each of the `packed` codes of a block of
    `numerics.pack`. `unit`: within so many neighbours of a tile the scale is the same.
    `ahead` steps are on their way from memory at once, with `scales_ahead` those of groups too.
    """

    rows: int
    outputs: int
    size: int
    packed: int
    run: int
    unit: int
    splits: int
    ahead: int
    scales_ahead: bool
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What the kernel is compiled for: `group` is how many along `k` share a scale."""

    rows: int
    n: int
    k: int
    group: int
    format: Format
    out_dtype: np.dtype
    tiling: Tiling
    interpret: bool

    @property
    def grouped(self) -> bool:
        return self.group < self.k

    @property
    def steps(self) -> int:
        """How many tiles lie along one output."""
        cut = self.tiling
        return self.k // cut.packed * -(-cut.run // cut.size)

    @property
    def steps_of_split(self) -> int:
        """Of how many steps one of the splits is: a multiple of those that are ahead."""
        cut = self.tiling
        return -(-self.steps // (cut.splits * cut.ahead)) * cut.ahead


def weight_only(
    problem: Problem,
    x: Float[Array, "rows k"],
    codes: Any,
    scale: Any,
    zero: Any,
    poison: Any = None,
) -> Float[Array, "rows n"]:
    """`x` by codes `[n, bytes]` with `scale` (and `zero`) `[n, groups]`.

    `poison` is what the result's memory holds before: `[splits, rows, n]`.
    """
    p, cut = problem, problem.tiling
    whole = cut.splits == 1
    shape = jax.ShapeDtypeStruct((cut.splits, p.rows, p.n), p.out_dtype if whole else jnp.float32)
    args = [x, codes, scale] + ([] if zero is None else [zero])
    if poison is not None:
        args.append(poison)
    y = gpu_call(
        partial(_kernel, p, zero is not None),
        name=f"weight_only_{p.format.name.lower()}",
        grid=(-(-p.n // cut.outputs), cut.splits, -(-p.rows // cut.rows)),
        out_shape=shape,
        warps=cut.warps,
        stages=cut.stages,
        interpret=p.interpret,
        in_out=None if poison is None else {len(args) - 1: 0},
    )(*args)
    return y[0] if whole else y.sum(axis=0).astype(p.out_dtype)


def _kernel(p: Problem, has_zero: bool, x_ref: Any, w_ref: Any, s_ref: Any, *refs: Any) -> None:
    z_ref = refs[0] if has_zero else None
    o_ref = refs[-1]
    cut = p.tiling
    tile = _Tile(p, x_ref, w_ref, s_ref, z_ref)
    first = program_id(1) * p.steps_of_split

    def body(i: Any, carry: Any) -> Any:
        sums, *held = carry
        for ahead in range(cut.ahead):
            step = first + i * cut.ahead + ahead
            sums = tile.add(sums, step, held[ahead])
            held[ahead] = tile.load(step + cut.ahead)
        return (sums, *held)

    start = jnp.zeros((cut.outputs, cut.rows), jnp.float32)
    held = [tile.load(first + ahead) for ahead in range(cut.ahead)]
    sums, *_ = lax.fori_loop(0, p.steps_of_split // cut.ahead, body, (start, *held))
    if not p.grouped:
        sums = sums * tile.scale_of(tile.load_scale(0))
    rows, outputs = tile.row + jnp.arange(cut.rows), tile.output + jnp.arange(cut.outputs)
    gpu_store(
        o_ref.at[program_id(1), ds(tile.row, cut.rows), ds(tile.output, cut.outputs)],
        tile.outputs_back(sums).T.astype(o_ref.dtype),
        mask=(rows < p.rows)[:, None] & (outputs < p.n)[None, :],
    )


class _Tile:
    """The steps of one block."""

    def __init__(self, p: Problem, x: Any, w: Any, s: Any, z: Any) -> None:
        self.p, self.cut = p, p.tiling
        self.x, self.w, self.s, self.z = x, w, s, z
        self.output = program_id(0) * self.cut.outputs
        self.row = program_id(2) * self.cut.rows
        self.outputs = jnp.minimum(self.output + jnp.arange(self.cut.outputs), p.n - 1)
        self.exact_n = p.n % self.cut.outputs == 0

    def at(self, step: Any) -> tuple[Any, Any]:
        """The block of `numerics.pack` of a step, and where in its runs it starts."""
        a_block = -(-self.cut.run // self.cut.size)
        if a_block == 1:
            return step, 0
        if a_block == self.p.steps:
            return 0, step * self.cut.size
        return step // a_block, step % a_block * self.cut.size

    def load(self, step: Any) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """The bytes of a step, and its scales; past the end those of the last one."""
        p, cut = self.p, self.cut
        block, start = self.at(jnp.minimum(step, p.steps - 1))
        columns = block * (cut.packed * p.format.bits // 8) + start
        bytes_ = [self._load_codes(columns, cut.run - start)]
        if p.format.bits == 3:
            # The first half of a run has the even bits of an eighth of the block, from its start.
            tiles = cut.packed // 8 // cut.size
            tile = start // cut.size
            there = block * (cut.packed * 3 // 8) + cut.packed // 4
            if tiles > 1:
                there = there + tile % tiles * cut.size
            high = self._load_codes(there, cut.run)
            bytes_.append(high >> jnp.asarray(tile // tiles).astype(jnp.uint8))
        return tuple(bytes_), self.scales(block, start) if cut.scales_ahead else ()

    def scales(self, block: Any, start: Any) -> tuple[Array, ...]:
        """What the sums of a step are multiplied by: one of each run's, or one of all of them."""
        return tuple(self.load_scale(k // self.p.group) for k in self._scaled_at(block, start))

    def _scaled_at(self, block: Any, start: Any) -> list[Any]:
        p, cut = self.p, self.cut
        if not (p.grouped and cut.unit == cut.size):
            return []
        if p.group % cut.packed == 0:
            return [block * cut.packed]
        return [block * cut.packed + run * cut.run + start for run in range(runs(p.format))]

    def _load_codes(self, column: Any, left: Any) -> Array:
        cut = self.cut
        ref = self.w.at[ds(self.output, cut.outputs), ds(column, cut.size)]
        mask = None
        if cut.run % cut.size:
            mask = jnp.broadcast_to((jnp.arange(cut.size) < left)[None, :], (cut.outputs, cut.size))
        if not self.exact_n:
            inside = (self.output + jnp.arange(cut.outputs) < self.p.n)[:, None]
            inside = jnp.broadcast_to(inside, (cut.outputs, cut.size))
            mask = inside if mask is None else mask & inside
        if mask is None:
            return gpu_load(ref)
        return gpu_load(ref, mask=mask, other=jnp.zeros((), self.w.dtype))

    def add(self, sums: Array, step: Any, held: Any) -> Array:
        """`sums` and the products of a step."""
        p, cut = self.p, self.cut
        block, start = self.at(step)
        held, scales = held
        low = held[0]
        if low.dtype != jnp.uint8:
            low = lax.bitcast_convert_type(low, jnp.uint8)
        high = held[1] if len(held) > 1 else None
        wanted = 3 if self.x.dtype == jnp.float32 else 1
        of = runs(p.format)
        together = of > 1 and cut.run == cut.size and wanted == 1
        if together:
            all_rows = self._activations_together(block * cut.packed, step, of)
        # Sums that are scaled, each run's alone or, where a block lies in one group, all runs'.
        after = p.grouped and cut.unit == cut.size
        alike = p.group % cut.packed == 0
        total: Any = None
        for run in range(of):
            k = block * cut.packed + run * cut.run + start
            rows = all_rows[run] if together else self._activations(k, step, cut.run - start)
            values = decoded(
                low,
                high,
                p.format,
                run,
                terms=terms_of(p.format, wanted),
                interpret=p.interpret,
            )
            if self.z is not None:
                values = [minus(values[0], self._wide(self.z, k), p.interpret)]
            if p.grouped and not after:
                values = self._scaled(values, k, wanted)
            values = [self._as_left_side(v) for v in values]
            if not after:
                sums = _add_products(sums, values, rows)
            elif alike:
                total = _add_products(total, values, rows)
            else:
                part = _add_products(None, values, rows)
                sums = sums + part * self.scale_of(self._scale(scales, run, k))
        if after and alike:
            sums = sums + total * self.scale_of(self._scale(scales, 0, block * cut.packed))
        return sums

    def _activations(self, k: Any, step: Any, left: Any) -> list[Array]:
        """Activations `[rows, size]` in the order of the left side, in bfloat16 terms."""
        p, cut = self.p, self.cut
        ref = self.x.at[ds(self.row, cut.rows), ds(k, cut.size)]
        mask = (self.row + jnp.arange(cut.rows) < p.rows)[:, None]
        inside = None
        if cut.run % cut.size:
            inside = jnp.arange(cut.size) < left
        if p.steps_of_split * cut.splits != p.steps:
            there = jnp.broadcast_to(step < p.steps, (cut.size,))
            inside = there if inside is None else inside & there
        if inside is not None:
            mask = mask & inside[None, :]
        mask = jnp.broadcast_to(mask, (cut.rows, cut.size))
        x = self._columns(gpu_load(ref, mask=mask, other=jnp.zeros((), self.x.dtype)))
        return _terms(x) if x.dtype == jnp.float32 else [x]

    def _activations_together(self, k: Any, step: Any, of: int) -> list[list[Array]]:
        """The activations of `of` runs that are neighbours, by one load."""
        p, cut = self.p, self.cut
        shape = (cut.rows, of * cut.size)
        mask = jnp.broadcast_to((self.row + jnp.arange(cut.rows) < p.rows)[:, None], shape)
        if p.steps_of_split * cut.splits != p.steps:
            mask = mask & jnp.broadcast_to(step < p.steps, shape)
        ref = self.x.at[ds(self.row, cut.rows), ds(k, of * cut.size)]
        x = gpu_load(ref, mask=mask, other=jnp.zeros((), self.x.dtype))
        # As `_columns`, and the runs last, which Triton takes apart two by two.
        x = x.reshape(cut.rows, of, 4, cut.size // 16, 2, 2).transpose(0, 3, 4, 2, 5, 1)
        parts = [x.reshape(cut.rows, cut.size, of)]
        while of > 1:
            of //= 2
            halves = [v.reshape(cut.rows, cut.size, of, 2) for v in parts]
            split = [jnp.unstack(v, axis=-1) for v in halves]
            # Of runs in order, the even ones and the odd ones.
            parts = [v for pair in split for v in pair]
        order = _bit_reversed(len(parts))
        parts = [parts[i].reshape(cut.rows, cut.size) for i in order]
        return [[v] for v in parts]

    def _columns(self, v: Array) -> Array:
        """The summed axis in the order in which `wgmma` meets what the threads hold.

        Of a tile of 64 each of four threads holds 16 neighbours; `wgmma` takes of each thread two
        neighbours for the first and two for the second half of 16.
        """
        size = self.cut.size
        v = v.reshape(v.shape[0], 4, size // 16, 2, 2)
        return v.transpose(0, 2, 3, 1, 4).reshape(-1, size)

    def _as_left_side(self, v: Array) -> Array:
        """Both axes so ordered that no thread needs what another one loaded."""
        return self._outputs(self._columns(v))

    def _outputs(self, v: Array) -> Array:
        warps, outputs = self.cut.warps, self.cut.outputs
        v = v.reshape(outputs // (16 * warps), 2, warps, 8, -1).transpose(0, 2, 1, 3, 4)
        return v.reshape(outputs, -1)

    def outputs_back(self, v: Array) -> Array:
        """Undoes the order of outputs."""
        warps, outputs = self.cut.warps, self.cut.outputs
        v = v.reshape(outputs // (16 * warps), warps, 2, 8, -1).transpose(0, 2, 1, 3, 4)
        return v.reshape(outputs, -1)

    def _scale(self, ahead: tuple[Array, ...], which: int, k: Any) -> Array:
        return ahead[which] if ahead else self.load_scale(k // self.p.group)

    def load_scale(self, group: Any) -> Array:
        return gpu_load(self.s.at[self.outputs, jnp.minimum(group, self.s.shape[1] - 1)])

    def scale_of(self, scale: Array) -> Array:
        """`[outputs, 1]` in float32, in the order of the sums."""
        return self._outputs(_real(scale, jnp.float32)[:, None])

    def _wide(self, ref: Any, k: Any) -> Array:
        """A bfloat16 of each group for each byte of a tile whose first code is the `k`-th."""
        cut, p = self.cut, self.p
        unit = cut.unit if p.grouped else cut.size
        starts = k + jnp.arange(cut.size // unit) * unit
        groups = jnp.minimum(starts // p.group, ref.shape[1] - 1)
        shape = (cut.outputs, cut.size // unit)
        rows = jnp.broadcast_to(self.outputs[:, None], shape)
        part = gpu_load(ref.at[rows, jnp.broadcast_to(groups[None, :], shape)])
        part = jnp.broadcast_to(part[:, :, None], (*shape, unit))
        return part.reshape(cut.outputs, cut.size)

    def _scaled(self, values: list[Array], k: Any, wanted: int) -> list[Array]:
        scale = self._wide(self.s, k)
        if wanted == 1:
            scale = _real(scale, jnp.bfloat16)
            return [times(values[0], scale, self.p.interpret)]
        exact = values[0].astype(jnp.float32)
        for v in values[1:]:
            exact = exact + v.astype(jnp.float32)
        return _terms(exact * _real(scale, jnp.float32))


def _add_products(sums: Array | None, left: list[Array], right: list[Array]) -> Array:
    """`sums + sum left right^T` over terms, but those that float32 would not show; least first."""
    pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j <= 2]
    for i, j in sorted(pairs, key=lambda pair: -sum(pair)):
        part = gpu_dot(left[i], right[j].T)
        sums = part if sums is None else sums + part
    assert sums is not None
    return sums


def _bit_reversed(count: int) -> list[int]:
    """Where each of `count` things is after they were dealt to two, each of these to two, ..."""
    order = [0]
    while len(order) < count:
        order = [2 * i for i in order] + [2 * i + 1 for i in order]
    return order


def _terms(x: Array) -> list[Array]:
    """Three bfloat16 numbers that add up to a float32: 8 bits each of its 24."""
    terms = []
    for _ in range(3):
        terms.append(x.astype(jnp.bfloat16))
        x = x - terms[-1].astype(jnp.float32)
    return terms


def _real(scale: Array, dtype: Any) -> Array:
    """Scales as `dtype`; bytes are exponents (E8M0)."""
    if scale.dtype != jnp.uint8:
        return scale.astype(dtype)
    if dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(scale.astype(jnp.uint16) << np.uint16(7), jnp.bfloat16)
    return lax.bitcast_convert_type(scale.astype(jnp.uint32) << np.uint32(23), jnp.float32)


def least_unit(size: int, group: int, packed: int, k: int, run: int, of: int) -> int:
    """Within how many neighbours of every tile the scale is the same."""
    if group >= k:
        return size
    starts = [run * i for i in range(1, of)]
    blocks = [packed] if packed < k else []
    return math.gcd(size, group, *starts, *blocks)
