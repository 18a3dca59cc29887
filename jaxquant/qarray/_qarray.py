"""QArray: a pytree of codes and scales that stands for an array."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..numerics import decode, unpack
from ._layout import inverse, Layout
from ._scheme import Scheme


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QArray:
    """An array held as codes: `value = (code - zero_point) * scale`, tile by tile.

    `codes`, `scale` and `zero_point` have one axis for each axis of the array, in the stored order
    of `layout`. The tile of an axis is what the shapes say: `codes.shape[i] / scale.shape[i]`.
    So axes may be stacked on and sliced off by `jax.tree.map`, `vmap` and `scan` like those of any
    pytree. `scheme`, `layout` and `dtype` (what the array was, and what `dequantize` returns) are
    static. Leaves may be arrays, tracers, shapes or shardings; `check_qarray` checks them.

    It says how an array is held, never how an op computes with it.
    """

    codes: Any
    scale: Any
    zero_point: Any
    scheme: Scheme = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Lengths of the stored axes, in codes, whether packed or not."""
        shape = tuple(self.codes.shape)
        return shape if self.layout.packed is None else (*shape[:-1], 2 * shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this stands for."""
        stored = self.stored_shape
        return tuple(stored[i] for i in inverse(self.layout.permutation(self.ndim)))

    @property
    def size(self) -> int:
        return math.prod(self.codes.shape) * (1 if self.layout.packed is None else 2)

    @property
    def stored_tile(self) -> tuple[int, ...]:
        """The tile of each stored axis."""
        return tuple(n // s for n, s in zip(self.stored_shape, self.scale.shape, strict=True))

    @property
    def tile(self) -> tuple[int, ...]:
        """The tile of each axis of the array that this stands for."""
        tile = self.stored_tile
        return tuple(tile[i] for i in inverse(self.layout.permutation(self.ndim)))

    @property
    def nbytes(self) -> int:
        """Bytes of the codes once packed, with scales and zero points: what it truly costs."""
        bits = self.size * self.scheme.values.bits
        if self.zero_point is not None:
            assert self.scheme.zero_point is not None
            bits += math.prod(self.zero_point.shape) * self.scheme.zero_point.bits
        return -(-bits // 8) + math.prod(self.scale.shape) * self.scheme.scale.bits // 8

    @property
    def bits_per_value(self) -> float:
        """`8 nbytes / size`: scales and zero points included."""
        return 8.0 * self.nbytes / self.size

    @property
    def T(self) -> "QArray":
        from ._reshape import transpose

        return transpose(self, tuple(reversed(range(self.ndim))))

    def __getitem__(self, index: Any) -> "QArray":
        """Basic indexing: integers, slices, `...`. See `slice_qarray` for what is refused."""
        from ._reshape import slice_qarray

        return slice_qarray(self, index)

    def __repr__(self) -> str:
        try:
            shape = "x".join(map(str, self.shape))
        except (AttributeError, TypeError):
            # A pytree's leaves are at times not arrays (shardings, None, names).
            return f"QArray({self.scheme}, leaves={type(self.codes).__name__})"
        return f"QArray({shape} {self.scheme}, {self.bits_per_value:.3f} bits/value)"


def is_qarray(x: Any) -> bool:
    """Whether `x` is a `QArray`; for `is_leaf=`."""
    return isinstance(x, QArray)


def storage_of(q: QArray) -> np.dtype:
    """The dtype that the scheme and the layout of `q` give its codes."""
    if q.layout.packed is not None:
        return np.dtype(np.uint8)
    return np.dtype(np.int8) if q.layout.wide else q.scheme.values.storage


def check_qarray(q: QArray) -> None:
    """Checks what ops rely on.

    **Raises:** `ValueError` or `TypeError` naming the leaf that does not fit.
    """
    storage = storage_of(q)
    if q.codes.dtype != storage:
        raise TypeError(
            f"Codes of {q.scheme.values} are stored as {storage}, but these are {q.codes.dtype}. "
            "Make QArrays with `quantize_array`, or fix the dtype where they were loaded."
        )
    if q.scale.dtype != q.scheme.scale.storage:
        raise TypeError(
            f"The scheme holds scales as {q.scheme.scale}, but these are {q.scale.dtype}."
        )
    parts = {"scale": q.scale}
    if (q.zero_point is None) != (q.scheme.zero_point is None):
        raise ValueError(
            f"The scheme {q.scheme} and the zero point {type(q.zero_point).__name__} disagree."
        )
    if q.zero_point is not None:
        parts["zero_point"] = q.zero_point
    for name, part in parts.items():
        fits = len(part.shape) == q.ndim and all(
            s > 0 and n % s == 0 for n, s in zip(q.stored_shape, part.shape, strict=False)
        )
        if not fits:
            raise ValueError(
                f"A {name} of shape {tuple(part.shape)} cannot tile codes of stored shape "
                f"{q.stored_shape}: the ranks must agree and each axis must divide."
            )


def stored_codes(q: QArray, dtype: Any = None) -> Array:
    """The codes in stored order, one an element; as `dtype` where given."""
    if q.layout.packed is None:
        return q.codes if dtype is None else q.codes.astype(dtype)
    return unpack(q.codes, q.layout.packed, dtype or q.scheme.values.storage)


def stored_values(q: QArray, dtype: Any) -> Array:
    """What the codes stand for before zero points and scales, in stored order, as `dtype`."""
    return decode(stored_codes(q), dtype)


def scale_values(q: QArray) -> Float[Array, "..."]:
    """The scales of `q` in float32, in stored order, one a tile."""
    return q.scale.astype(jnp.float32)


def spread(part: Array, tile: tuple[int, ...]) -> Array:
    """Repeats each scale over its tile, as a broadcast that XLA can fuse."""
    wide, shape = [], []
    for n, t in zip(part.shape, tile, strict=True):
        wide += [n, 1]
        shape += [n, t]
    full = jnp.broadcast_to(part.reshape(wide), shape)
    return full.reshape([n * t for n, t in zip(part.shape, tile, strict=True)])


def dequantize(q: QArray, dtype: Any = None) -> Float[Array, "..."]:
    """The array that `q` stands for: `(code - zero_point) * scale` in float32, then `dtype`.

    `dtype` defaults to `q.dtype`, the dtype of the array that was quantized.
    """
    check_qarray(q)
    values = stored_values(q, jnp.float32)
    tile = q.stored_tile
    if q.zero_point is not None:
        values = values - spread(q.zero_point.astype(jnp.float32), tile)
    values = values * spread(scale_values(q), tile)
    values = values.transpose(inverse(q.layout.permutation(q.ndim)))
    return values.astype(q.dtype if dtype is None else dtype)


def bytes_held(x: Any) -> int:
    """Packed bytes of an array or QArray, or of what stands for one (a shape and a dtype)."""
    if isinstance(x, QArray):
        return x.nbytes
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize
