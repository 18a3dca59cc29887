"""From an array to a QArray: the tile's range, the scale, the nearest codes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    """
    values = x.astype(jnp.float32)
    split = [part for n, t in zip(x.shape, tile, strict=True) for part in (n // t, t)]
    within = tuple(range(1, 2 * x.ndim, 2))
    tiles = values.reshape(split)
    low, high = tiles.min(axis=within), tiles.max(axis=within)
    if isinstance(scheme.range, AbsMax):
        scale = stored_scale(symmetric_scale(low, high, scheme.range, scheme.values), scheme)
        zero = None
        shifted = values / spread(scale.astype(jnp.float32), tile)
    else:
        assert scheme.zero_point is not None
        scale = stored_scale(asymmetric_scale(low, high, scheme.values), scheme)
        exact = scale.astype(jnp.float32)
        zero = encode(zero_point(low, exact, scheme.values), scheme.zero_point)
        shifted = values / spread(exact, tile) + spread(zero.astype(jnp.float32), tile)
    return QArray(
        codes=encode(shifted, scheme.values),
        scale=scale,
        zero_point=zero,
        scheme=scheme,
        layout=CANONICAL,
        dtype=np.dtype(x.dtype),
    )


def stored_scale(scale: Float[Array, "*tiles"], scheme: Scheme) -> Float[Array, "*tiles"]:
    """Scales as they are stored: finite, and never rounded down to 0."""
    storage = scheme.scale.storage
    tiny = jnp.finfo(storage).tiny
    size = jnp.clip(jnp.abs(scale), tiny.astype(jnp.float32), scheme.scale.highest)
    return jnp.where(scale < 0, -size, size).astype(storage)


def abstract_qarray(
    shape: tuple[int, ...], dtype: Any, scheme: Scheme, tile: tuple[int, ...]
) -> QArray:
    """The shapes of `quantize_tiles(x, scheme, tile)` for an `x` of `shape`, without any `x`."""
    return jax.eval_shape(
        lambda x: quantize_tiles(x, scheme, tile), jax.ShapeDtypeStruct(shape, dtype)
    )
