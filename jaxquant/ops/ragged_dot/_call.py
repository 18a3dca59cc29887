"""One call of `ragged_dot`, as every backend receives it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from ...qarray import QArray

Operand = Array | QArray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RaggedCall:
    """Rows `lhs[M, K]`, experts `rhs[E, K, N]`, and how many rows in turn go to each expert."""

    lhs: Any
    rhs: Any
    group_sizes: Any
    precision: Any
    out_dtype: np.dtype

    def multiply(self, lhs: Array, rhs: Array, precision: Any, sum_dtype: Any) -> Array:
        """The ragged product of these arrays in place of the operands."""
        return lax.ragged_dot(
            lhs, rhs, self.group_sizes, precision=precision, preferred_element_type=sum_dtype
        )

    def expert_of_row(self) -> Int[Array, " M"]:
        """The expert of each row; `E` for rows beyond the last group."""
        ends = jnp.cumsum(self.group_sizes)
        rows = jnp.arange(self.lhs.shape[0], dtype=ends.dtype)
        return jnp.searchsorted(ends, rows, side="right")
