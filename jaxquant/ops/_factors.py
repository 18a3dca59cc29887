"""What an op multiplies, what it scales afterwards, and which codes it cannot multiply.

For `dot`, which splits its sums by groups (`dot/_split.py`), and for ops that sum all at once.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ..numerics import BFLOAT16
from ..qarray import QArray
from ..qarray._layout import inverse
from ..qarray._qarray import over_codes, scale_values, spread, stored_values

# int32 holds sums of so many products of two int8.
LONGEST_SUM = (2**31 - 1) // (128 * 128)


def stored_factors(q: QArray, dtype: Any) -> Shaped[Array, "..."]:
    """What the codes stand for as `dtype`, zero points taken off, not yet scaled; stored order."""
    values = stored_values(q, dtype)
    if q.zero_point is None:
        return values
    return values - over_codes(q, q.zero_point.astype(dtype))


def factors(q: QArray, dtype: Any) -> Shaped[Array, "..."]:
    """`stored_factors` in logical order."""
    return stored_factors(q, dtype).transpose(inverse(q.layout.permutation(q.ndim)))


def kept_scale(q: QArray, contracted: list[bool]) -> Array:
    """The scales of `q` in stored order, for each element of the axes that are not contracted.

    An axis that one scale spans stays 1 long.
    """
    tile, shape = [], []
    held = zip(contracted, q.scale.shape, q.stored_tile, q.stored_shape, strict=True)
    for summed, scales, own, n in held:
        alone = summed or scales == 1
        tile.append(1 if alone else own)
        shape.append(scales if alone else n)
    return spread(scale_values(q), tuple(tile), tuple(shape))


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
    exact = dtype is None or exact_codes(q, dtype)
    return one_scale and exact and q.offset is None


def exact_codes(q: QArray, dtype: Any) -> bool:
    """Whether `dtype` holds what the codes of `q` stand for before scales.

    Of codes less a zero point that lies between two of them it holds what float32 would.
    """
    if q.scheme.real_zero_point and np.dtype(dtype) != np.float32:
        return False
    return q.scheme.values.exact_in(np.dtype(dtype))


def common_tile(n: int, *tiles: int) -> int:
    """The widest run of an axis of `n` elements within which scales of these tiles are constant.

    Where the last tile is short, it need not divide the axis.
    """
    own = [tile for tile in tiles if tile != n]
    return math.gcd(*own) if own else n


def fits_int8(q: QArray) -> bool:
    """Whether every code of `q` less its zero point is an `int8`, as far as their formats tell."""
    values, zero = q.scheme.values, q.scheme.zero_point
    if q.scheme.real_zero_point:
        return False
    low, high = values.lowest, values.highest
    if zero is not None:
        low, high = low - zero.highest, high - zero.lowest
    return -128 <= low and high <= 127


def refuses_centered(*operands: QArray) -> str | None:
    """Why sums of codes do not tell the product, or `None`."""
    if any(q.offset is not None for q in operands):
        return "it scales sums of codes, and a centered QArray is more than that"
    return None


def refuses_sum(products: int) -> str | None:
    """Why so many products of two int8 cannot be summed, or `None`."""
    if products > LONGEST_SUM:
        return f"int32 holds sums of {LONGEST_SUM} products, not of {products}"
    return None


def refuses_codes(lhs: QArray, rhs: QArray) -> str | None:
    """Why codes of two QArrays cannot be multiplied with each other, or `None`."""
    reason = refuses_centered(lhs, rhs)
    if reason is not None:
        return reason
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
