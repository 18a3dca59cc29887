"""The columns of a weight one by one, each rounded to mend what the ones before it did.

Let `H = L^T D L`, where `L` is lower triangular with ones on its diagonal. The outputs of a row
with errors `e` err by `e H e^T = sum_k D_k (e L^T)_k^2`, so that the best code of a column, given
the columns that are done, is the one nearest to its value plus their errors times its entries in
the factor. These are the steps of GPTQ without the inverse of `H` (QuIP, arXiv:2307.13304, theorem
6): one Cholesky factorization instead of two and an inverse between them, and columns that wait are
read, never written.

Arrays lie columns first, `[k, n]`, and in reversed order, the last row being the first to be
rounded, since Cholesky factors are lower triangular.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from ..numerics import as_bytes, Format
from ..numerics._cast import nearest_in_bytes
from ..numerics._scale import offset_by
from ._panels import Panels

_CHUNK = 512
"""Columns whose errors are multiplied at once, at most."""
_EXACT = lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What codes stand for: `(value - zero) * scale`, of one column or, stacked, of several.

    `zero` is a code in float32, or `None`; `real` says that it may lie between two codes.
    """

    scale: Any
    zero: Any
    real: bool = dataclasses.field(default=False, metadata={"static": True})

    def nearest(
        self, w: Float[Array, " n"], format: Format
    ) -> tuple[Float[Array, " n"], Shaped[Array, " n"]]:
        """The values nearest to `w` that there are codes for, and the codes, a byte each.

        As in `quantize_array`, whose codes these are for the same `w`.
        """
        lost = self.scale == 0
        shifted = w * jnp.where(lost, 0.0, 1.0 / jnp.where(lost, 1.0, self.scale))
        if self.zero is not None:
            whole = not self.real
            shifted = jnp.round(shifted) + self.zero if whole else offset_by(shifted, self.zero)
        if format.integer:
            # By way of an integer of 4 bits this is several times slower on a CPU.
            values = jnp.round(jnp.clip(shifted, format.lowest, format.highest))
            codes = values.astype(jnp.int8 if format.signed else jnp.uint8)
        else:
            values, codes = nearest_in_bytes(shifted, format)
        if self.zero is not None:
            values = values - self.zero
        return values * self.scale, codes


Choose = Callable[[Any, Float[Array, "g n"]], tuple[Grid, Any]]
"""From the turn of a group and its columns to its grid, a row of it, and what is kept of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InTurn:
    """`choose` makes the grid of each group when its turn comes; `empty` is what it keeps of all
    groups, before the first."""

    choose: Choose
    empty: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """Grids that are there beforehand, and which one each slot has."""

    grids: Any
    of_slot: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk:
    panels: Panels
    format: Format
    by: InTurn | Given


_Done = tuple[Float[Array, "k n"], Shaped[Array, "k n"], Any]


def round_columns(
    factor: Float[Array, "k k"],
    w: Float[Array, "k n"],
    *,
    panels: Panels,
    format: Format,
    by: InTurn | Given,
) -> _Done:
    """The errors `w - q` in all slots, the codes, a byte each, and what `choose` kept.

    `factor` is `C` of `H = C C^T`, lower triangular, with rows and columns in reversed order.
    """
    walk = _Walk(panels=panels, format=format, by=by)
    slots, n = w.shape
    size = panels.sizes[0]
    at_once = size * max(
        m
        for m in range(1, slots // size + 1)
        if slots // size % m == 0 and m * size <= _CHUNK or m == 1
    )

    def block(turn: Any, done: _Done) -> _Done:
        errors, codes, kept = done
        low = slots - (turn + 1) * size

        def more(chunk: Any, left: Float[Array, "b n"]) -> Float[Array, "b n"]:
            start = slots - (chunk + 1) * at_once
            beside = lax.dynamic_slice(factor, (start, low), (at_once, size))
            return left + _product(beside, _rows(errors, start, at_once))

        chunks = (turn * size + at_once - 1) // at_once
        left = lax.fori_loop(0, chunks, more, jnp.zeros((size, n), jnp.float32))
        own = lax.dynamic_slice(factor, (low, low), (size, size))
        part = _inside(walk, 0, low, own, _rows(w, low, size), left, kept, None)
        return _placed(errors, part[0], low), _placed(codes, part[1], low), part[2]

    kept = by.empty if isinstance(by, InTurn) else None
    return lax.fori_loop(0, slots // size, block, (*_none_yet(walk, slots, n), kept))


def _inside(
    walk: _Walk,
    depth: int,
    low: Any,
    own: Float[Array, "b b"],
    w: Float[Array, "b n"],
    left: Float[Array, "b n"],
    kept: Any,
    grid: Grid | None,
) -> _Done:
    """Errors and codes of a run of columns from slot `low` on.

    `own` are its entries in the factor, `left` is what the errors of the columns before it come to.
    """
    sizes, by = walk.panels.sizes, walk.by
    size = sizes[depth]
    if isinstance(by, InTurn) and size == walk.panels.group:
        turn = walk.panels.groups - 1 - low // size
        # What the columns would be at best, were none of the group rounded.
        # A solve of the factor alone, and a product: of all rows it would be a solve in one thread.
        inverse = lax.linalg.triangular_solve(
            own, jnp.eye(size, dtype=own.dtype), left_side=True, lower=True
        )
        mended = w + _product(inverse, left)
        grid, new = by.choose(turn, mended)
        kept = jax.tree.map(lambda all, one: _placed(all, one[None], turn), kept, new)
    if depth + 1 == len(sizes):
        if isinstance(by, Given):
            of_slot = lax.dynamic_slice(by.of_slot, (low,), (size,))
            grid = jax.tree.map(lambda rows: rows[of_slot], by.grids)
        assert grid is not None
        return *_leaf(walk, own, w, left, grid), kept
    inner = sizes[depth + 1]

    def run(turn: Any, done: _Done) -> _Done:
        errors, codes, kept = done
        at = size - (turn + 1) * inner
        beside = lax.dynamic_slice(own, (0, at), (size, inner))
        more = _rows(left, at, inner) + _product(beside, errors)
        part = _inside(
            walk,
            depth + 1,
            low + at,
            _rows(beside, at, inner),
            _rows(w, at, inner),
            more,
            kept,
            grid,
        )
        return _placed(errors, part[0], at), _placed(codes, part[1], at), part[2]

    return lax.fori_loop(0, size // inner, run, (*_none_yet(walk, size, w.shape[1]), kept))


def _leaf(
    walk: _Walk,
    own: Float[Array, "b b"],
    w: Float[Array, "b n"],
    left: Float[Array, "b n"],
    grid: Grid,
) -> tuple[Float[Array, "b n"], Shaped[Array, "b n"]]:
    """The columns of a leaf, one by one."""
    size = len(w)
    inverse = 1.0 / jnp.diagonal(own)

    def column(turn: Any, done: Any) -> Any:
        errors, codes = done
        at = size - 1 - turn
        beside = lax.dynamic_slice(own, (0, at), (size, 1))[:, 0]
        total = left[at] + jnp.matmul(beside, errors, precision=_EXACT)
        mine = jax.tree.map(lambda x: x[at] if x.ndim == 2 else x, grid)
        q, code = mine.nearest(w[at] + total * inverse[at], walk.format)
        return _placed(errors, (w[at] - q)[None], at), _placed(codes, code[None], at)

    return lax.fori_loop(0, size, column, _none_yet(walk, size, w.shape[1]))


def _none_yet(walk: _Walk, slots: int, n: int) -> tuple[Float[Array, "k n"], Shaped[Array, "k n"]]:
    """Errors of 0, and no codes: columns that wait add nothing to a product."""
    return jnp.zeros((slots, n), jnp.float32), jnp.zeros((slots, n), byte_of(walk.format))


def byte_of(format: Format) -> Any:
    """The dtype of the codes of `format`, a byte each."""
    if format.integer:
        return jnp.dtype(jnp.int8 if format.signed else jnp.uint8)
    return jax.eval_shape(lambda: as_bytes(jnp.zeros((), format.storage))).dtype


def _rows(x: Shaped[Array, "k n"], start: Any, count: int) -> Shaped[Array, "c n"]:
    return lax.dynamic_slice_in_dim(x, start, count)


def _placed(x: Shaped[Array, "..."], part: Shaped[Array, "..."], start: Any) -> Any:
    return lax.dynamic_update_slice_in_dim(x, part, start, axis=0)


def _product(a: Float[Array, "c b"], b: Float[Array, "c n"]) -> Float[Array, "b n"]:
    return jnp.matmul(a.T, b, precision=_EXACT)
