"""Rows that a site multiplies, and what observers do with them: sums and peaks over the rows.

Rows are `[*stack, rows, k]`, or `Grouped`: those of a ragged product, whose experts see rows of
uneven number. A statistic has one slice for each stack entry, or for each expert.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..numerics._scale import any_nan

SLICE = 256
"""Rows of one expert that are multiplied at a time; each expert costs at most one slice more."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Grouped:
    """Rows `[rows, k]`, those of one group after those of another: `sizes` is `[groups]`.

    Rows beyond the last group belong to none.
    """

    rows: Any
    sizes: Any

    @property
    def groups(self) -> Int[Array, " rows"]:
        """The group of each row; the number of groups for rows that belong to none."""
        ends = jnp.cumsum(self.sizes)
        places = jnp.arange(self.rows.shape[0], dtype=ends.dtype)
        return jnp.searchsorted(ends, places, side="right").astype(jnp.int32)

    @property
    def belongs(self) -> Any:
        """Which rows belong to a group."""
        return self.groups < self.sizes.shape[0]


Rows = Float[Array, "*stack rows k"] | Grouped


def values(x: Rows) -> Any:
    """The rows themselves."""
    return x.rows if isinstance(x, Grouped) else x


def total(x: Rows, each: Any) -> Any:
    """Sums of what is `[*stack, rows, ...]`, over the rows."""
    if isinstance(x, Grouped):
        count = x.sizes.shape[0]
        return jax.ops.segment_sum(each, x.groups, count, indices_are_sorted=True)
    return each.sum(axis=x.ndim - 2, dtype=each.dtype)


def largest(x: Rows, each: Any, empty: float) -> Any:
    """The largest of what is `[*stack, rows, k]`, over the rows; NaN where there is one.

    `empty` where there are no rows.
    """
    if isinstance(x, Grouped):
        found = jax.ops.segment_max(each, x.groups, x.sizes.shape[0], indices_are_sorted=True)
        found = jnp.where(found == -jnp.inf, empty, found) if empty != -jnp.inf else found
        # A maximum may drop NaN (see `numerics.peak`): hence the second look.
        return jnp.where(total(x, jnp.isnan(each).astype(jnp.int32)) > 0, jnp.nan, found)
    if x.shape[-2] == 0:
        return jnp.full((*x.shape[:-2], x.shape[-1]), empty, each.dtype)
    found = each.max(axis=-2)
    return jnp.where(any_nan(each, -2)[..., 0, :], jnp.nan, found)


def gram(x: Rows, precision: lax.Precision) -> Any:
    """`x^T x` of each stack entry or group, with sums in float32."""
    if not isinstance(x, Grouped):
        return _square(x, precision)
    rows, sizes = x.rows, x.sizes
    count, k, groups = rows.shape[0], rows.shape[1], sizes.shape[0]
    if count == 0:
        return jnp.zeros((groups, k, k), jnp.float32)
    size = min(count, SLICE)
    # Cut where a group ends and after every `size` rows: each piece is of one group, and there are
    # as many pieces as full slices and groups together, whatever the sizes are.
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    regular = jnp.arange(size, count, size, dtype=jnp.int32)
    stops = jnp.sort(jnp.concatenate([regular, jnp.minimum(ends, count)]))
    starts = jnp.concatenate([stops[:1] * 0, stops[:-1]])
    group = jnp.searchsorted(ends, starts, side="right").astype(jnp.int32)
    padded = jnp.concatenate([rows, jnp.zeros((size, k), rows.dtype)])

    def piece(have: Any, cut: Any) -> Any:
        start, stop, group = cut
        part = lax.dynamic_slice_in_dim(padded, start, size)
        inside = jnp.arange(size, dtype=jnp.int32) < stop - start
        part = jnp.where(inside[:, None], part, jnp.zeros_like(part))
        # An index past the end, of rows that belong to none, is dropped.
        return have.at[group].add(_square(part, precision), mode="drop"), None

    # Zeros that vary over devices as the rows and sizes do: a carry must not change its type.
    zero = jnp.where(jnp.isnan(rows[0, 0]) | (sizes[0] < 0), 0.0, 0.0).astype(jnp.float32)
    start = jnp.zeros((groups, k, k), jnp.float32) + zero
    return lax.scan(piece, start, (starts, stops, group))[0]


def _square(x: Any, precision: lax.Precision) -> Any:
    return jnp.einsum(
        "...rk,...rl->...kl", x, x, precision=precision, preferred_element_type=jnp.float32
    )
