"""One product with outliers, as every backend receives it."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ...qarray import QArray, Scheme
from ..dot._call import DotCall
from ._values import Outliers


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OutlierCall:
    """`dot` with an ordinary array on one side, and what is done to it.

    `columns` and `originals` are known weights: `[*batch, m]` places among the contracted axes,
    flattened in the order of the dimension numbers, and `[*batch, m, n]`, with `n` the free axes of
    the weight, flattened. A place past the end is none.
    """

    dot: DotCall
    activations: Scheme
    outliers: Outliers
    columns: Any = None
    originals: Any = None

    @property
    def side(self) -> int:
        """Which operand is the ordinary array."""
        return 1 if isinstance(self.dot.lhs, QArray) else 0

    @property
    def x(self) -> Array:
        return (self.dot.lhs, self.dot.rhs)[self.side]

    @property
    def w(self) -> QArray:
        return (self.dot.lhs, self.dot.rhs)[1 - self.side]

    def with_sides(self, x: Any, w: Any) -> DotCall:
        """The product with another array in place of each, in the same order."""
        lhs, rhs = (w, x) if self.side else (x, w)
        return dataclasses.replace(self.dot, lhs=lhs, rhs=rhs)

    def big(self) -> Bool[Array, "..."]:
        """Which elements are outliers. NaN is one, so that it reaches its row alone."""
        x = self.x.astype(jnp.float32)
        return jnp.logical_not(jnp.abs(x) < self.outliers.threshold)

    def in_columns(self, big: Bool[Array, "..."]) -> Bool[Array, "..."]:
        """Which columns hold some: free axes are 1 long."""
        return big.any(axis=self.dot.free(self.side), keepdims=True)

    def known(self) -> Bool[Array, "..."]:
        """Of which columns the original weights are known, in the shape of `in_columns`."""
        sizes, k = self.sizes
        batch = self.columns.shape[:-1]
        flat = self.columns.reshape(-1, self.columns.shape[-1])
        rows = jnp.arange(flat.shape[0])[:, None]
        found = jnp.zeros((flat.shape[0], k), bool).at[rows, flat].set(True, mode="drop")
        return self.spread(found.reshape(*batch, *sizes))

    @property
    def sizes(self) -> tuple[list[int], int]:
        """The lengths of the contracted axes, and their product."""
        sizes = [self.x.shape[a] for a in self.dot.contracted[self.side]]
        return sizes, math.prod(sizes)

    def spread(self, part: Array) -> Array:
        """`[*batch, *contracted]` with an axis for each of `x`: free axes are 1 long."""
        axes = (*self.dot.batch[self.side], *self.dot.contracted[self.side])
        part = part.transpose(sorted(range(len(axes)), key=lambda i: axes[i]))
        return jnp.expand_dims(part, self.dot.free(self.side))

    def rows(self, x: Float[Array, "..."]) -> Float[Array, "*batch rows k"]:
        """`x` with its free axes as rows and its contracted ones as columns."""
        batch, free = self.dot.batch[self.side], self.dot.free(self.side)
        moved = x.transpose([*batch, *free, *self.dot.contracted[self.side]])
        shape = [x.shape[a] for a in batch]
        return moved.reshape(*shape, math.prod(x.shape[a] for a in free), self.sizes[1])

    def as_result(self, y: Float[Array, "*batch rows n"]) -> Float[Array, "..."]:
        """A product of rows in the shape that `dot_general` gives it."""
        batch = y.shape[:-2]
        own, other = (
            [operand.shape[a] for a in self.dot.free(side)]
            for operand, side in ((self.x, self.side), (self.w, 1 - self.side))
        )
        if self.side:
            y = jnp.swapaxes(y, -1, -2)
            own, other = other, own
        return y.reshape(*batch, *own, *other)
