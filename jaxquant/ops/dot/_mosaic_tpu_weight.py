"""Weight-only products on TPU: codes are read once, as they are, and become factors in registers.

The grid goes over cores, tiles of rows, of columns and of `k`. Within a step, `unit` rows of the
weight are decoded and multiplied at a time; each group's partial sum is scaled once. Where a group
is narrower than a unit, the activations stand on the left once for each of its groups, with zeros
elsewhere: the matrix unit is fed the weight only once, and feeding it is what takes its time.

Activations in float32 are split into three bfloat16 that add up to them, and these sums are added
before they are scaled: products with codes of up to 8 bits are exact either way.

With the first tile of columns, the columns of the activations are put in the order in which the
decoder gives rows, and their sums over groups are kept: times scales and zero points, in one more
product, these are what the codes were too large by. The matrix unit does both, by matrices of zeros
and ones; elsewhere XLA would spend more time on them than the product takes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from .. import _pallas as pallas
from ._mosaic_tpu_decode import Decoder, row_of

TERMS = 3
"""bfloat16 numbers that hold a float32: 3 x 8 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """What one step of the grid reads: `rows` of activations, `k` by `n` of the weight.

    `unit` rows and `columns` of the weight are multiplied at a time; they divide `k` and `n`. Tiles
    of columns are dealt out to `cores`, evenly.
    """

    rows: int
    k: int
    n: int
    unit: int
    columns: int
    cores: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """How the weight of a product is held: the static side of what `weight_product` is given.

    `group` neighbours along `k` share a scale; the last group may be shorter. `exponents`: scales
    are bytes of E8M0. `register_groups` are the rows of a register of scales, or of zero points if
    these are narrower: blocks that are not the whole array hold whole registers.
    """

    k: int
    n: int
    group: int
    decoder: Decoder
    exponents: bool = False
    register_groups: int = 8


def weight_product(
    x: Float[Array, "rows k"],
    codes: Shaped[Array, "*layers k stored"],
    scale: Shaped[Array, "*layers groups n"],
    zero_point: Shaped[Array, "*layers groups n"] | None,
    bias: Float[Array, " n"] | None,
    *,
    weight: Weight,
    blocks: Blocks,
    out_dtype: Any,
    layer: Int32[Array, ""] | None = None,
    vmem_bytes: int | None = None,
    interpret: bool = False,
) -> Float[Array, "rows n"]:
    """`x @ ((codes - zero_point) * scale) + bias`, summed in float32.

    Of weights that are stacked, `layer` says which one: its blocks are read where they lie.
    """
    rows = x.shape[0]
    terms = _terms(x)
    kernel = _Kernel(
        weight=weight,
        blocks=blocks,
        terms=terms.shape[0],
        zero=zero_point is not None,
        bias=bias is not None,
        k_steps=weight.k // blocks.k,
    )
    n_steps = -(-weight.n // blocks.n) // blocks.cores
    groups = -(-blocks.k // weight.group)

    def column(core: Any, n: Any) -> Any:
        return core * n_steps + n

    def x_step(n: Any, k: Any) -> Any:
        # What the first tile of columns has read is kept.
        return k if kernel.k_steps == 1 else jnp.where(n == 0, k, kernel.k_steps - 1)

    def group_step(k: Any) -> Any:
        # A scale for all of `k` is in every step the same.
        return k if weight.group < weight.k else 0

    def of_weight(step: Any, *block: int) -> Any:
        if layer is None:
            return pallas.BlockSpec(block, lambda c, m, n, k: (step(k), column(c, n)))
        return pallas.BlockSpec(
            (None, *block), lambda c, m, n, k, at: (at[0], step(k), column(c, n))
        )

    by_group = of_weight(group_step, groups, blocks.n)
    operands: list[Any] = [terms, codes, scale]
    specs = [
        pallas.BlockSpec(
            (terms.shape[0], blocks.rows, blocks.k),
            lambda c, m, n, k, *at: (0, m, x_step(n, k)),
        ),
        of_weight(lambda k: k, blocks.k, weight.decoder.columns(blocks.n)),
        by_group,
    ]
    if zero_point is not None:
        operands.append(zero_point)
        specs.append(by_group)
    if bias is not None:
        operands.append(bias.reshape(1, -1))
        specs.append(pallas.BlockSpec((1, blocks.n), lambda c, m, n, k, *at: (0, column(c, n))))
    return pallas.tpu_call(
        kernel,
        name="jaxquant_weight_product",
        grid=(blocks.cores, -(-rows // blocks.rows), n_steps, kernel.k_steps),
        semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
        in_specs=specs,
        out_specs=pallas.BlockSpec(
            (blocks.rows, blocks.n), lambda c, m, n, k, *at: (m, column(c, n))
        ),
        out_shape=jax.ShapeDtypeStruct((rows, weight.n), out_dtype),
        scratch=kernel.scratch,
        chosen=None if layer is None else layer.reshape(1),
        cost=_cost(rows, weight, operands, layer is not None, out_dtype),
        vmem_bytes=vmem_bytes,
        interpret=interpret,
    )(*operands)


def _cost(
    rows: int, weight: Weight, operands: list[Any], stacked: bool, out_dtype: Any
) -> tuple[int, int]:
    """Operations, and bytes that are moved: each operand once, of a stack one entry."""
    read = sum(_bytes(x) // (x.shape[0] if stacked and x.ndim == 3 else 1) for x in operands[1:])
    written = rows * weight.n * jnp.dtype(out_dtype).itemsize
    return 2 * rows * weight.k * weight.n, _bytes(operands[0]) + read + written


def _bytes(x: Array) -> int:
    """Bytes of an array on a TPU, where two 4-bit numbers share one."""
    bits = 4 if x.dtype in (jnp.int4, jnp.uint4, jnp.float4_e2m1fn) else 8 * x.dtype.itemsize
    return x.size * bits // 8


def _terms(x: Array) -> Shaped[Array, "terms rows k"]:
    """What adds up to the activations, in the dtype in which the kernel multiplies."""
    if x.dtype == jnp.bfloat16:
        return x[None]
    parts, left = [], x
    for _ in range(TERMS):
        # The barrier keeps XLA from taking the cast to bfloat16 and back for nothing.
        part = lax.optimization_barrier(left.astype(jnp.bfloat16))
        parts.append(part)
        left = left - part.astype(jnp.float32)
    return jnp.stack(parts)


# Of which terms of a sum and of a scale the products are added: what is left out is below 2^-24.
_PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))


def _split(x: Array) -> list[Array]:
    """Three bfloat16 that add up to a float32."""
    parts = []
    for _ in range(TERMS):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kernel:
    weight: Weight
    blocks: Blocks
    terms: int
    zero: bool
    bias: bool
    k_steps: int

    @property
    def corrected(self) -> bool:
        """Whether codes are summed that are too large."""
        return self.zero or self.weight.decoder.offset != 0

    @property
    def in_place(self) -> bool:
        """Whether units of activations are read where they are: whole registers, in order.

        Where there are several steps along `k` they would come again for every tile of columns.
        """
        ordered = self.weight.decoder.pieces == 1 and self.blocks.unit % 128 == 0
        return ordered and self.k_steps == 1

    @property
    def groups(self) -> int:
        return -(-self.blocks.k // self.weight.group)

    @property
    def scratch(self) -> list[Any]:
        held, rows, unit = [], self.blocks.rows, self.blocks.unit
        if not self.in_place:
            units = self.blocks.k // unit
            held.append(pallas.VMEM((self.k_steps, units, self.terms * rows, unit), jnp.bfloat16))
        if self.corrected:
            shape = (self.k_steps, rows, len(_PAIRS) * self.groups)
            held.append(pallas.VMEM(shape, jnp.bfloat16))
        if self.k_steps > 1:
            held.append(pallas.VMEM((rows, self.blocks.n), jnp.float32))
        return held

    def __call__(self, x_ref: Any, w_ref: Any, scale_ref: Any, *refs: Any) -> None:
        rest = list(refs)
        zero_ref = rest.pop(0) if self.zero else None
        bias_ref = rest.pop(0) if self.bias else None
        out_ref = rest.pop(0)
        ordered_ref = None if self.in_place else rest.pop(0)
        seen_ref = rest.pop(0) if self.corrected else None
        # Kept for all tiles of columns, by steps along `k`.
        k = pallas.program_id(3)
        ordered_ref = None if ordered_ref is None else ordered_ref.at[k]
        seen_ref = None if seen_ref is None else seen_ref.at[k]

        @pallas.when(pallas.program_id(2) == 0)
        def _() -> None:
            if ordered_ref is not None:
                self._order(x_ref, ordered_ref)
            if seen_ref is not None:
                self._sum_groups(x_ref, seen_ref)

        for at in range(0, self.blocks.n, self.blocks.columns):
            columns = slice(at, at + self.blocks.columns)
            y = self._scaled_sums(x_ref, ordered_ref, w_ref, scale_ref, columns)
            if seen_ref is not None:
                y = y - self._too_much(seen_ref, scale_ref, zero_ref, columns)
            self._add(y, bias_ref, out_ref, rest, columns)

    def _add(self, y: Array, bias_ref: Any, out_ref: Any, sums: list[Any], at: slice) -> None:
        """Adds the sums of this step; with the last step, writes what comes out."""

        def finish(y: Array) -> None:
            if bias_ref is not None:
                y = y + bias_ref[:, at].astype(jnp.float32)
            out_ref[:, at] = y.astype(out_ref.dtype)

        if self.k_steps == 1:
            finish(y)
            return
        (sum_ref,) = sums
        k = pallas.program_id(3)

        @pallas.when(k == 0)
        def _() -> None:
            sum_ref[:, at] = y

        @pallas.when((k > 0) & (k < self.k_steps - 1))
        def _() -> None:
            sum_ref[:, at] += y

        @pallas.when(k == self.k_steps - 1)
        def _() -> None:
            finish(sum_ref[:, at] + y)

    def _flat(self, x_ref: Any, unit: int) -> Shaped[Array, "stacked unit"]:
        """One unit of activations, all terms of it below each other."""
        size = self.blocks.unit
        x = x_ref[:, :, unit * size : (unit + 1) * size]
        return x.reshape(-1, size)

    def _order(self, x_ref: Any, ordered_ref: Any) -> None:
        unit, pieces = self.blocks.unit, self.weight.decoder.pieces
        row = lax.broadcasted_iota(jnp.int32, (unit, unit), 0)
        column = lax.broadcasted_iota(jnp.int32, (unit, unit), 1)
        moved = (row == row_of(column, unit, pieces)).astype(jnp.bfloat16)
        for u in range(self.blocks.k // unit):
            x = self._flat(x_ref, u)
            if pieces > 1:
                x = self._dot(x, moved).astype(jnp.bfloat16)
            ordered_ref[u] = x

    def _sum_groups(self, x_ref: Any, seen_ref: Any) -> None:
        group, rows = self.weight.group, self.blocks.rows
        # Where groups are that wide, a register's 128 columns lie within one.
        whole = group % 128 == 0
        lane = lax.broadcasted_iota(jnp.int32, (rows, self.groups), 1)
        seen = jnp.zeros((rows, self.groups), jnp.float32)
        for at in range(0, self.blocks.k, 128):
            x = x_ref[:, :, at : at + 128].astype(jnp.float32).sum(axis=0)
            column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
            for g in range(at // group, -(-min(at + 128, self.blocks.k) // group)):
                own = (at + column) // group == g
                part = x if whole else jnp.where(own, x, jnp.zeros_like(x))
                part = part.sum(axis=1, keepdims=True)
                seen = seen + jnp.where(lane == g, part, jnp.zeros_like(seen))
        parts = _split(seen)
        seen_ref[...] = jnp.concatenate([parts[i] for i, _ in _PAIRS], axis=1)

    def _dot(self, x: Array, w: Array) -> Array:
        return lax.dot_general(
            x,
            w,
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    def _scaled_sums(
        self, x_ref: Any, ordered_ref: Any, w_ref: Any, scale_ref: Any, columns: slice
    ) -> Float[Array, "rows n"]:
        group, unit = self.weight.group, self.blocks.unit
        total, sums = None, None
        for u in range(self.blocks.k // unit):
            x = self._flat(x_ref, u) if ordered_ref is None else ordered_ref[u]
            w = self.weight.decoder.decode(w_ref, u * unit, unit, columns)
            end = (u + 1) * unit
            for i, part in enumerate(self._by_group(x, w)):
                sums = part if sums is None else sums + part
                if group > unit and end % group and end != self.blocks.k:
                    continue
                g = (u * unit + i * group) // group
                scaled = sums * self._scales(scale_ref, slice(g, g + 1), columns)
                total = scaled if total is None else total + scaled
                sums = None
        assert total is not None
        return total

    def _by_group(self, x: Array, w: Array) -> list[Float[Array, "rows n"]]:
        """The sums of products over each group of a unit."""
        unit, rows = self.blocks.unit, self.blocks.rows
        count = max(1, unit // self.weight.group)
        if count > 1:
            column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
            own = row_of(column, unit, self.weight.decoder.pieces) // self.weight.group
            none = jnp.zeros_like(x)
            x = jnp.concatenate([jnp.where(own == i, x, none) for i in range(count)])
        sums = self._dot(x, w)
        runs = [sums[at : at + rows] for at in range(0, sums.shape[0], rows)]
        return [sum(runs[i + 1 : i + self.terms], runs[i]) for i in range(0, len(runs), self.terms)]

    def _too_much(
        self, seen_ref: Any, scale_ref: Any, zero_ref: Any, columns: slice
    ) -> Float[Array, "rows n"]:
        """What offsets and zero points add to the scaled sums."""
        by = self.weight.decoder.offset
        if zero_ref is not None:
            by = zero_ref[:, columns].astype(jnp.float32) + by
        parts = _split(self._scales(scale_ref, slice(None), columns) * by)
        return self._dot(seen_ref[...], jnp.concatenate([parts[i] for _, i in _PAIRS], axis=0))

    def _scales(self, scale_ref: Any, groups: slice, columns: slice) -> Float[Array, "groups n"]:
        scale = scale_ref[groups, columns]
        if self.weight.exponents:
            # The byte of an E8M0 is the exponent of a float32.
            scale = lax.bitcast_convert_type(scale.astype(jnp.int32) << 23, jnp.float32)
        scale, factor = scale.astype(jnp.float32), self.weight.decoder.factor
        return scale if factor == 1 else scale * factor
