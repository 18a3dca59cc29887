"""One call of `dot_general`, as every backend receives it."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from ...qarray import abstract_qarray, QArray, Scheme
from .._activations import quantize_activation
from .._target import Device

Operand = Array | QArray
DimensionNumbers = tuple[
    tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """Where a weight lies: entry `index` of the first stored axis of `stack`.

    What reads it there spares the copy that taking the entry out would be.
    """

    stack: QArray
    index: Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DotCall:
    """Operands, dimension numbers (over logical axes), precision, and the dtype of the result.

    `device` is what it will be compiled for; with `interpret` a kernel for another device is run
    step by step. `sharding` is how the weight lies on a mesh, by its logical axes, where known.
    `activations`, where the side that is no QArray is to be rounded to that scheme first; `layer`,
    where the weight is one of a stack.
    """

    lhs: Any
    rhs: Any
    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    precision: Any
    out_dtype: np.dtype
    device: Device
    interpret: bool = False
    sharding: NamedSharding | None = None
    activations: Scheme | None = None
    layer: Layer | None = None

    @property
    def platform(self) -> str:
        return self.device.platform

    @property
    def dimension_numbers(self) -> DimensionNumbers:
        return self.contracted, self.batch

    def free(self, side: int) -> tuple[int, ...]:
        """Axes of operand `side` that are neither contracted nor batch, in logical order."""
        operand = (self.lhs, self.rhs)[side]
        taken = self.contracted[side] + self.batch[side]
        return tuple(a for a in range(len(operand.shape)) if a not in taken)

    def rows(self, side: int) -> int:
        """How many independent vectors operand `side` brings to each batch entry."""
        operand = (self.lhs, self.rhs)[side]
        return math.prod(operand.shape[a] for a in self.free(side))

    def rounded(self) -> "DotCall":
        """The same product, its plain side rounded as `activations` says."""
        if self.activations is None:
            return self
        side = 1 if isinstance(self.lhs, QArray) else 0
        x: Any = (self.lhs, self.rhs)[side]
        scheme = self.activations
        q = quantize_activation(x, scheme, contracted=self.contracted[side], stack=self.batch[side])
        return self._with_side(side, q)

    def rounded_shapes(self) -> "DotCall":
        """`rounded` for those who only look at shapes: nothing is computed."""
        if self.activations is None:
            return self
        side = 1 if isinstance(self.lhs, QArray) else 0
        x, scheme = (self.lhs, self.rhs)[side], self.activations
        q = abstract_qarray(
            x.shape, x.dtype, scheme, contracted=self.contracted[side], stack=self.batch[side]
        )
        return self._with_side(side, q)

    def _with_side(self, side: int, q: QArray) -> "DotCall":
        lhs, rhs = (q, self.rhs) if side == 0 else (self.lhs, q)
        return dataclasses.replace(self, lhs=lhs, rhs=rhs, activations=None)

    @property
    def flipped(self) -> "DotCall":
        """The same product with the sides exchanged; the result's free axes swap places."""
        return dataclasses.replace(
            self,
            lhs=self.rhs,
            rhs=self.lhs,
            contracted=self.contracted[::-1],
            batch=self.batch[::-1],
        )
