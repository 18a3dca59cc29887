"""The quantized convolution: what may be called, and which backend answers."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ...qarray import check_qarray, QArray
from .._dispatch import first_willing
from . import _reference, _xla
from ._call import ConvCall, Operand

# In order of preference; the reference answers only to its name or when all others refuse.
BACKENDS = {"xla": _xla, "reference": _reference}


def conv_general_dilated(
    lhs: Operand,
    rhs: Operand,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    *,
    out_dtype: Any = None,
    backend: str | None = None,
) -> Float[Array, "..."]:
    """`jax.lax.conv_general_dilated` with a QArray on either side, or both.

    The axes of a weight that are summed, `contracted` for `quantize_array`, are all but its output
    features; those of an activation all but its batch: windows overlap, so that a scale can hold
    for an image or for all of them, not for less. Sums are int32 where both sides hold integers,
    else float32; the result has `out_dtype`, by default the wider of the dtypes that the operands
    stand for.

    **Raises:** `Refusal` (a `NotImplementedError`) with the reason if the named backend cannot;
    what `jax.lax` raises for shapes and settings that do not fit each other.

    ```python
    q = jq.quantize_array(kernel, scheme, contracted=(0, 1, 2))  # [height, width, in, out]
    numbers = ("NHWC", "HWIO", "NHWC")
    y = conv_general_dilated(images, q, (1, 1), "SAME", dimension_numbers=numbers)
    ```
    """
    settings = dict(
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
    )
    call = make_call(lhs, rhs, dimension_numbers, settings, precision, out_dtype)
    name, _ = first_willing("conv", BACKENDS, lambda b: b.refuses(call), backend)
    return BACKENDS[name].run(call)


def make_call(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: Any,
    settings: dict[str, Any],
    precision: Any = None,
    out_dtype: Any = None,
) -> ConvCall:
    """Checks the operands and fills in what was left out."""
    for operand in (lhs, rhs):
        if isinstance(operand, QArray):
            check_qarray(operand)
    return ConvCall(
        lhs=lhs,
        rhs=rhs,
        dimension_numbers=lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers),
        settings=settings,
        precision=precision,
        out_dtype=np.dtype(out_dtype or jnp.promote_types(lhs.dtype, rhs.dtype)),
    )
