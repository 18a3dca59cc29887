"""From an array to a QArray: the tile's range, the scale, the nearest codes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..numerics import AbsMax, encode
from ..numerics._range import asymmetric_scale, symmetric_scale, zero_point
from ._layout import CANONICAL
from ._qarray import QArray, spread
from ._scheme import Scheme, tile_shape


def quantize_array(
    x: Float[Array, "..."],
    scheme: Scheme,
    *,
    contracted: tuple[int, ...] = (-1,),
    stack: tuple[int, ...] = (),
) -> QArray:
    """Rounds `x` to the nearest values of `scheme`.

    `contracted` are the axes that the op sums over and `stack` those that merely hold several
    arrays side by side; both may count from the end. The other axes are kept.

    **Raises:** `ValueError` where tiles do not fill an axis, `TypeError` if `x` is not floating.

    ```python
    scheme = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=64))
    q = jq.quantize_array(w, scheme, contracted=(0,))
    ```
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"Only floating-point arrays are quantized; got {x.dtype}. Cast it first, or name "
            "another array."
        )
    tile = tile_shape(
        x.shape,
        scheme.tile,
        contracted=tuple(a % x.ndim for a in contracted),
        stack=tuple(a % x.ndim for a in stack),
    )
    return quantize_tiles(x, scheme, tile)


def quantize_tiles(x: Float[Array, "..."], scheme: Scheme, tile: tuple[int, ...]) -> QArray:
    """Rounds `x` to the nearest values of `scheme`, with the tile of each axis given.

    Arithmetic is in float32; codes are chosen for the scale as it is stored, so that rounding a
    scale to 16 bits costs clipping of at most its own rounding error and nothing else.

    The bits do not depend on how this is compiled: values are multiplied by the reciprocal of
    their scale (XLA turns some of the divisions by a broadcast into that), and rounded before a
    zero point is added (a product and a sum may be contracted to one operation).
    """
    values = x.astype(jnp.float32)
    split = [part for n, t in zip(x.shape, tile, strict=True) for part in (n // t, t)]
    within = tuple(range(1, 2 * x.ndim, 2))
    tiles = values.reshape(split)
    counts = tuple(n // t for n, t in zip(x.shape, tile, strict=True))
    if isinstance(scheme.range, AbsMax):
        wanted = symmetric_scale(tiles, within, scheme.range, scheme.values)
        scale = stored_scale(wanted.reshape(counts), scheme)
        zero = None
        shifted = values * spread(1.0 / scale.astype(jnp.float32), tile)
    else:
        assert scheme.zero_point is not None
        wanted, low = asymmetric_scale(tiles, within, scheme.values)
        scale = stored_scale(wanted.reshape(counts), scheme)
        exact = scale.astype(jnp.float32)
        zero = encode(zero_point(low.reshape(counts), exact, scheme.values), scheme.zero_point)
        shifted = jnp.round(values * spread(1.0 / exact, tile))
        shifted = shifted + spread(zero.astype(jnp.float32), tile)
    return QArray(
        codes=encode(shifted, scheme.values),
        scale=scale,
        zero_point=zero,
        scheme=scheme,
        layout=CANONICAL,
        dtype=np.dtype(x.dtype),
    )


def stored_scale(scale: Float[Array, "*tiles"], scheme: Scheme) -> Float[Array, "*tiles"]:
    """Scales as they are stored: finite, with a finite reciprocal, and never rounded to 0."""
    info = jnp.finfo(scheme.scale.storage)
    # 2**126 is the largest float32 whose reciprocal XLA does not flush to 0.
    size = jnp.clip(jnp.abs(scale), float(info.tiny), min(scheme.scale.highest, 2.0**126))
    signed = jnp.where(scale < 0, -size, size)
    # A cast there and back may be compiled away; this rounding may not.
    return lax.reduce_precision(signed, info.nexp, info.nmant).astype(scheme.scale.storage)


def abstract_qarray(
    shape: tuple[int, ...], dtype: Any, scheme: Scheme, tile: tuple[int, ...]
) -> QArray:
    """The shapes of `quantize_tiles(x, scheme, tile)` for an `x` of `shape`, without any `x`."""
    return jax.eval_shape(
        lambda x: quantize_tiles(x, scheme, tile), jax.ShapeDtypeStruct(shape, dtype)
    )
