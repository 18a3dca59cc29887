"""What an op multiplies and what it scales afterwards, for ops that sum all at once.

`dot` splits its sums by groups (`dot/_split.py`); a convolution cannot. All here is in logical
order.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ..numerics import BFLOAT16
from ..qarray import QArray
from ..qarray._layout import inverse
from ..qarray._qarray import over_codes, stored_values
from .dot._split import fits_int8, kept_scale


def factors(q: QArray, dtype: Any) -> Shaped[Array, "..."]:
    """What the codes stand for as `dtype`, zero points taken off and not yet scaled."""
    values = stored_values(q, dtype)
    if q.zero_point is not None:
        values = values - over_codes(q, q.zero_point.astype(dtype))
    return values.transpose(inverse(q.layout.permutation(q.ndim)))


def scales(q: QArray, summed: tuple[int, ...]) -> Float[Array, "..."]:
    """The scales, one a tile along the axes `summed` and one an element along the others."""
    logical = q.layout.permutation(q.ndim)
    scale = kept_scale(q, [a in summed for a in logical]).transpose(inverse(logical))
    shape = [n if a in summed else q.shape[a] for a, n in enumerate(scale.shape)]
    return jnp.broadcast_to(scale, shape)


def scaled_after(q: QArray, summed: tuple[int, ...], dtype: Any = None) -> bool:
    """Whether sums of codes over the axes `summed` need but one product with a scale each.

    Where `dtype` is given, it has to hold what the codes stand for too.
    """
    one_scale = all(q.tile[a] == q.shape[a] for a in summed)
    exact = dtype is None or q.scheme.values.exact_in(np.dtype(dtype))
    return one_scale and exact and q.offset is None


def refuses_codes(lhs: QArray, rhs: QArray) -> str | None:
    """Why codes of two QArrays cannot be multiplied with each other, or `None`."""
    if lhs.offset is not None or rhs.offset is not None:
        return "it scales sums of codes, and a centered QArray is more than that"
    formats = lhs.scheme.values, rhs.scheme.values
    if formats[0].integer != formats[1].integer:
        return (
            f"it multiplies integers with integers and floats with floats, not {formats[0]} with "
            f"{formats[1]}"
        )
    for q in (lhs, rhs):
        if q.scheme.values.integer and not fits_int8(q):
            return (
                f"{q.scheme.values} less its zero point does not fit int8, which the integer "
                "product multiplies"
            )
    return None


def product_dtypes(lhs: QArray, rhs: QArray) -> tuple[Any, Any]:
    """The dtypes in which what the codes of two QArrays stand for is multiplied and summed."""
    formats = lhs.scheme.values, rhs.scheme.values
    if all(f.integer for f in formats):
        return jnp.int8, jnp.int32
    exact = all(f.exact_in(BFLOAT16.storage) for f in formats)
    return (jnp.bfloat16 if exact else jnp.float32), jnp.float32
