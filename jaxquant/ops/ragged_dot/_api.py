"""The quantized ragged product: what may be called, and which backend answers."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from ...qarray import check_qarray, QArray
from .._dispatch import first_willing
from . import _reference, _xla
from ._call import Operand, RaggedCall

# In order of preference; the reference answers only to its name or when all others refuse.
BACKENDS = {"xla": _xla, "reference": _reference}


def ragged_dot(
    lhs: Operand,
    rhs: Operand,
    group_sizes: Integer[Array, " E"],
    *,
    precision: Any = None,
    out_dtype: Any = None,
    backend: str | None = None,
) -> Float[Array, "M N"]:
    """`jax.lax.ragged_dot` with a QArray on either side, or both.

    The first `group_sizes[0]` rows of `lhs[M, K]` are multiplied with expert 0 of `rhs[E, K, N]`,
    the next `group_sizes[1]` with expert 1, and so on; rows beyond the last group give zeros.
    Experts are a stack: quantize them with `contracted=(1,), stack=(0,)`. Sums are int32 where both
    sides hold integers, else float32; the result has `out_dtype`, by default the wider of the
    dtypes that the operands stand for.

    **Raises:** `Refusal` (a `NotImplementedError`) with the reason if the named backend cannot;
    `ValueError` for shapes that do not fit each other.

    ```python
    q = jq.quantize_array(experts, scheme, contracted=(1,), stack=(0,))  # [E, K, N]
    y = ragged_dot(rows, q, group_sizes)
    ```
    """
    call = make_call(lhs, rhs, group_sizes, precision=precision, out_dtype=out_dtype)
    name, _ = first_willing("ragged_dot", BACKENDS, lambda b: b.refuses(call), backend)
    return BACKENDS[name].run(call)


def make_call(
    lhs: Operand,
    rhs: Operand,
    group_sizes: Integer[Array, " E"],
    *,
    precision: Any = None,
    out_dtype: Any = None,
) -> RaggedCall:
    """Checks the operands and fills in what was left out."""
    for operand in (lhs, rhs):
        if isinstance(operand, QArray):
            check_qarray(operand)
    shapes = tuple(lhs.shape), tuple(rhs.shape), tuple(group_sizes.shape)
    fits = len(shapes[0]) == 2 and len(shapes[1]) == 3
    if not fits or shapes[0][1] != shapes[1][1] or shapes[2] != shapes[1][:1]:
        raise ValueError(
            f"ragged_dot multiplies rows [M, K] with experts [E, K, N] by group sizes [E]; got "
            f"shapes {shapes[0]}, {shapes[1]} and {shapes[2]}. Transpose, or use dot_general for "
            "experts that are all applied to the same rows."
        )
    return RaggedCall(
        lhs=lhs,
        rhs=rhs,
        group_sizes=group_sizes,
        precision=precision,
        out_dtype=np.dtype(out_dtype or jnp.promote_types(lhs.dtype, rhs.dtype)),
    )
