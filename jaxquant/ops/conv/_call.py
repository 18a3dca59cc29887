"""One call of `conv_general_dilated`, as every backend receives it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import lax
from jaxtyping import Array

from ...qarray import QArray

Operand = Array | QArray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ConvCall:
    """Operands, where their axes stand, and the settings that `jax.lax` takes as they are.

    `settings` are strides, padding, dilations and the counts of feature and batch groups.
    """

    lhs: Any
    rhs: Any
    dimension_numbers: lax.ConvDimensionNumbers
    settings: Mapping[str, Any]
    precision: Any
    out_dtype: np.dtype

    @property
    def specs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of each side: batch (or output features), (input) features, spatial axes."""
        return tuple(self.dimension_numbers.lhs_spec), tuple(self.dimension_numbers.rhs_spec)

    def summed(self, side: int) -> tuple[int, ...]:
        """The axes of one side that the windows run over: all but its first."""
        return self.specs[side][1:]

    @property
    def products(self) -> int:
        """How many products one element of the result sums, at most."""
        return math.prod(self.rhs.shape[a] for a in self.summed(1))

    def convolve(self, lhs: Array, rhs: Array, precision: Any, sum_dtype: Any) -> Array:
        """The convolution of these arrays in place of the operands."""
        return lax.conv_general_dilated(
            lhs,
            rhs,
            dimension_numbers=self.dimension_numbers,
            precision=precision,
            preferred_element_type=sum_dtype,
            **self.settings,
        )
