"""Products of codes by codes on TPU: what both sides hold is multiplied as it is, or as bfloat16.

Sums of integers are exact: int8 by int8 in int32 where the matrix unit has it, else bfloat16 by
bfloat16 in float32, of at most 1024 products at a time (`128 * 128 * 1024 = 2^24`), which are added
in int32. 8-bit floats are summed in float32. Where a scale spans all of `k` the sums are scaled
once; else each group's sum is, and these are added in float32.

Activations may come plain: with the first tile of columns they are rounded, row by row, and codes
and scales are kept for the other tiles.
"""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from .. import _pallas as pallas
from ._mosaic_tpu_decode import as_bias_11
from ._mosaic_tpu_round import round_rows, Rounding

_LANES = 128


class Feed(enum.Enum):
    """How codes of the weight reach the matrix unit."""

    STORED = "as they are stored"
    INT8 = "converted to int8"
    BFLOAT16 = "converted to bfloat16"
    BIAS_11 = "as e4m3 whose exponents are biased by 11"
    """The 8-bit float of generations 5 and 6: the bits of e4m3 stand for 1/16 of its values there,
    but for -0, which is their NaN and is made 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """How the two sides of a product are held and multiplied: the static side of the kernel.

    Within `group` neighbours along `k` the scales of both sides are constant; `left_group` and
    `right_group` are the tiles of each. `left` is the dtype that codes of the left side are
    multiplied in. `longest` is how many products may be summed at a time. With `tiled`, scales of
    the weight come one for 128 columns.
    """

    k: int
    n: int
    group: int
    left_group: int
    right_group: int
    integer: bool
    left: np.dtype
    right: Feed
    longest: int
    tiled: bool = False
    rounding: Rounding | None = None

    @property
    def grouped(self) -> bool:
        return self.group != self.k


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeBlocks:
    """What one step of the grid reads: `rows` of activations, `k` by `n` of the weight.

    Tiles of columns are dealt out to `cores`, evenly. `vmem` is what the compiler may use.
    """

    rows: int
    k: int
    n: int
    cores: int = 1
    vmem: int | None = None


def codes_product(
    x: Shaped[Array, "rows k"],
    x_scale: Float[Array, "rows tiles"] | None,
    codes: Shaped[Array, "*layers k n"],
    scale: Float[Array, "groups n"] | Float[Array, "steps groups wide"],
    bias: Float[Array, " n"] | None,
    *,
    pair: Pair,
    blocks: CodeBlocks,
    out_dtype: Any,
    layer: Int32[Array, ""] | None = None,
    interpret: bool = False,
) -> Float[Array, "rows n"]:
    """`(x * x_scale) @ (codes * scale) + bias`; without `x_scale`, `x` is rounded here.

    `scale` is by step of columns, group and tile if `pair.tiled`. Of codes that are stacked,
    `layer` says which ones: their blocks are read where they lie.
    """
    rows = x.shape[0]
    kernel = _Kernel(pair=pair, blocks=blocks, bias=bias is not None, plain=np.dtype(x.dtype))
    n_steps = -(-pair.n // blocks.n) // blocks.cores

    def column(core: Any, n: Any) -> Any:
        return core * n_steps + n

    def x_step(n: Any, k: Any) -> Any:
        # To be rounded, rows are there whole; what the first tile of columns has read is kept.
        if pair.rounding:
            return 0
        return jnp.where(n == 0, k, kernel.k_steps - 1) if kernel.kept else k

    x_block = (blocks.rows, pair.k if pair.rounding else blocks.k)
    operands: list[Any] = [x]
    specs = [pallas.BlockSpec(x_block, lambda c, m, n, k, *at: (m, x_step(n, k)))]
    if x_scale is not None:
        by_step = x_scale.reshape(rows, kernel.left_steps, -1).transpose(1, 0, 2)
        operands.append(by_step)
        shape = (1, blocks.rows, by_step.shape[2])
        several = kernel.left_steps > 1
        specs.append(pallas.BlockSpec(shape, lambda c, m, n, k, *at: (k if several else 0, m, 0)))
    operands += [codes, kernel.by_step(scale)]
    steps = kernel.right_steps > 1
    if layer is None:
        specs.append(
            pallas.BlockSpec((blocks.k, blocks.n), lambda c, m, n, k, *at: (k, column(c, n)))
        )
    else:
        specs.append(
            pallas.BlockSpec(
                (None, blocks.k, blocks.n), lambda c, m, n, k, at: (at[0], k, column(c, n))
            )
        )
    shape = operands[-1].shape
    if pair.tiled:
        specs.append(
            pallas.BlockSpec(
                (1, 1, *shape[2:]), lambda c, m, n, k, *at: (k if steps else 0, column(c, n), 0, 0)
            )
        )
    else:
        specs.append(
            pallas.BlockSpec(
                (1, shape[1], blocks.n),
                lambda c, m, n, k, *at: (k if steps else 0, 0, column(c, n)),
            )
        )
    if bias is not None:
        operands.append(bias.reshape(1, -1))
        specs.append(pallas.BlockSpec((1, blocks.n), lambda c, m, n, k, *at: (0, column(c, n))))
    return pallas.tpu_call(
        kernel,
        name="jaxquant_codes_product",
        grid=(blocks.cores, -(-rows // blocks.rows), n_steps, kernel.k_steps),
        semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
        in_specs=specs,
        out_specs=pallas.BlockSpec(
            (blocks.rows, blocks.n), lambda c, m, n, k, *at: (m, column(c, n))
        ),
        out_shape=jax.ShapeDtypeStruct((rows, pair.n), out_dtype),
        scratch=kernel.scratch,
        chosen=None if layer is None else layer.reshape(1),
        cost=_cost(rows, pair, codes, operands, out_dtype),
        vmem_bytes=blocks.vmem,
        interpret=interpret,
    )(*operands)


def _cost(
    rows: int, pair: Pair, codes: Array, operands: list[Any], out_dtype: Any
) -> tuple[int, int]:
    """Operations, and bytes that are moved: each operand once, of a stack one entry."""
    bits = 4 if codes.dtype in (jnp.int4, jnp.uint4) else 8
    read = sum(x.size * x.dtype.itemsize for x in operands if x is not codes)
    written = rows * pair.n * jnp.dtype(out_dtype).itemsize
    return 2 * rows * pair.k * pair.n, pair.k * pair.n * bits // 8 + read + written


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kernel:
    pair: Pair
    blocks: CodeBlocks
    bias: bool
    plain: np.dtype

    @property
    def k_steps(self) -> int:
        return self.pair.k // self.blocks.k

    @property
    def left_steps(self) -> int:
        """In how many parts along `k` scales of the left side are read."""
        return 1 if self.pair.left_group == self.pair.k else self.k_steps

    @property
    def right_steps(self) -> int:
        return 1 if self.pair.right_group == self.pair.k else self.k_steps

    def by_step(self, scale: Array) -> Array:
        """The weight's scales with an axis for these parts in front."""
        steps = self.right_steps
        if not self.pair.tiled:
            return scale.reshape(steps, -1, scale.shape[1])
        columns, _, tiles = scale.shape
        return scale.reshape(columns, steps, -1, tiles).transpose(1, 0, 2, 3)

    @property
    def kept(self) -> bool:
        """Whether the left factors are made here, for all tiles of columns."""
        return self.pair.rounding is not None or self.plain != self.pair.left or self._sixteenths

    @property
    def _sixteenths(self) -> bool:
        return self.pair.right is Feed.BIAS_11

    @property
    def _sum_dtype(self) -> Any:
        return jnp.int32 if self.pair.integer and not self.pair.grouped else jnp.float32

    @property
    def scratch(self) -> list[Any]:
        held, rows = [], self.blocks.rows
        if self.kept:
            held.append(pallas.VMEM((self.k_steps, rows, self.blocks.k), self.pair.left))
        if self.pair.rounding:
            tiles = -(-self.pair.k // self.pair.rounding.group) // self.left_steps
            held.append(pallas.VMEM((self.left_steps, rows, tiles), jnp.float32))
        if self.k_steps > 1:
            held.append(pallas.VMEM((rows, self.blocks.n), self._sum_dtype))
        return held

    def __call__(self, x_ref: Any, *refs: Any) -> None:
        rest = list(refs)
        x_scale_ref = None if self.pair.rounding else rest.pop(0)
        w_ref, scale_ref = rest.pop(0), rest.pop(0)
        bias_ref = rest.pop(0) if self.bias else None
        out_ref = rest.pop(0)
        kept_ref = rest.pop(0) if self.kept else None
        x_scale_ref = rest.pop(0) if x_scale_ref is None else x_scale_ref
        k = pallas.program_id(3)
        first = pallas.program_id(2) == 0
        rounding = self.pair.rounding
        if rounding is not None:

            @pallas.when(first & (k == 0))
            def _() -> None:
                round_rows(x_ref, kept_ref, x_scale_ref, rounding, self._left)

        elif kept_ref is not None:

            @pallas.when(first)
            def _() -> None:
                kept_ref[k] = self._left(x_ref[...])

        left_ref = x_ref if kept_ref is None else kept_ref.at[k]
        here = k if rounding and self.left_steps > 1 else 0
        x_scale_ref = x_scale_ref.at[here]
        if self.pair.grouped:
            sums = self._scaled_sums(left_ref, x_scale_ref, w_ref, scale_ref)
        else:
            sums = self._sums(left_ref, w_ref, 0, self.blocks.k)

        def finish(y: Array) -> None:
            if not self.pair.grouped:
                y = y.astype(jnp.float32) * x_scale_ref[...] * self._scales(scale_ref)
            if bias_ref is not None:
                y = y + bias_ref[...].astype(jnp.float32)
            out_ref[...] = y.astype(out_ref.dtype)

        if self.k_steps == 1:
            finish(sums)
            return
        (sum_ref,) = rest

        @pallas.when(k == 0)
        def _() -> None:
            sum_ref[...] = sums

        @pallas.when((k > 0) & (k < self.k_steps - 1))
        def _() -> None:
            sum_ref[...] += sums

        @pallas.when(k == self.k_steps - 1)
        def _() -> None:
            finish(sum_ref[...] + sums)

    def _scaled_sums(
        self, left_ref: Any, x_scale_ref: Any, w_ref: Any, scale_ref: Any
    ) -> Float[Array, "rows n"]:
        pair, end = self.pair, self.blocks.k
        total, scales = None, self._scales(scale_ref)
        for start in range(0, end, pair.group):
            size = min(pair.group, end - start)
            sums = self._sums(left_ref, w_ref, start, size).astype(jnp.float32)
            i, j = start // pair.left_group, start // pair.right_group
            scaled = sums * x_scale_ref[:, i : i + 1] * scales[j : j + 1, :]
            total = scaled if total is None else total + scaled
        assert total is not None
        return total

    def _scales(self, scale_ref: Any) -> Float[Array, "groups n"]:
        if not self.pair.tiled:
            return scale_ref[0]
        tiles = scale_ref[0, 0]
        shape = (tiles.shape[0], _LANES)
        wide = [jnp.broadcast_to(tiles[:, i : i + 1], shape) for i in range(tiles.shape[1])]
        return jnp.concatenate(wide, axis=1)[:, : self.blocks.n]

    def _sums(self, left_ref: Any, w_ref: Any, start: int, size: int) -> Shaped[Array, "rows n"]:
        """Sums of products of codes from `start` on: int32 of integers, else float32."""
        total, end = None, start + size
        exact = self.pair.left == np.int8
        for at in range(start, end, self.pair.longest):
            within = slice(at, min(at + self.pair.longest, end))
            sums = lax.dot_general(
                left_ref[:, within],
                self._right(w_ref[within, :]),
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.int32 if exact else jnp.float32,
            )
            if self.pair.integer:
                sums = sums.astype(jnp.int32)
            total = sums if total is None else total + sums
        assert total is not None
        return total

    def _left(self, codes: Array) -> Array:
        """Codes, or what they stand for in float32, in the dtype in which they are multiplied."""
        factors = codes.astype(self.pair.left)
        # Rounds nothing: 448 * 16 is far from the ends of bfloat16.
        return factors * jnp.asarray(16, factors.dtype) if self._sixteenths else factors

    def _right(self, codes: Array) -> Array:
        match self.pair.right:
            case Feed.STORED:
                return codes
            case Feed.INT8:
                return codes.astype(jnp.int8)
            case Feed.BFLOAT16:
                return codes.astype(jnp.bfloat16)
            case Feed.BIAS_11:
                return as_bias_11(codes)
