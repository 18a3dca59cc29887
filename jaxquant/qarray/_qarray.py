"""QArray: a pytree of codes and scales that stands for an array."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..numerics import decode, FLOAT32, Format, unpack
from ..numerics._scale import offset_by
from ._layout import inverse, Layout
from ._scheme import Scheme


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QArray:
    """An array held as codes: `value = (decode(code) - zero_point) * scale + offset`, by tiles.

    `codes`, `scale`, `zero_point` and `offset` have one axis for each axis of the array, in the
    stored order of `layout`. The tile of an axis is what the shapes say, `codes.shape[i] /
    scale.shape[i]`, but for axes in `ragged` (counted from the end, in stored order), whose last
    tile is shorter than the one given there. So axes may be stacked on and sliced off by
    `jax.tree.map`, `vmap` and `scan` like those of any pytree. `scheme`, `layout`, `dtype` (what
    the array was, and what `dequantize` returns) and `ragged` are static. Leaves may be arrays,
    tracers, shapes or shardings; `check_qarray` checks them.

    Where the scheme of the scales is not a mere format, `scale` is a QArray in the same order, and
    `scale_values` reads it. Only schemes that are `centered` have an `offset`.

    It says how an array is held, never how an op computes with it.
    """

    codes: Any
    scale: Any
    zero_point: Any
    scheme: Scheme = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    offset: Any = None
    ragged: tuple[tuple[int, int], ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Lengths of the stored axes, in codes, whether packed or not."""
        shape = tuple(self.codes.shape)
        if self.layout.packed is None:
            return shape
        return (*shape[:-1], 8 * shape[-1] // self.scheme.values.bits)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this stands for."""
        stored = self.stored_shape
        return tuple(stored[i] for i in inverse(self.layout.permutation(self.ndim)))

    @property
    def size(self) -> int:
        return math.prod(self.stored_shape)

    @property
    def stored_tile(self) -> tuple[int, ...]:
        """The tile of each stored axis; the last one may be shorter where `ragged` says so."""
        tile = [n // max(s, 1) for n, s in zip(self.stored_shape, self.scale.shape, strict=True)]
        for axis, short in self.ragged:
            tile[axis] = short
        return tuple(tile)

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
        if self.offset is not None:
            bits += math.prod(self.offset.shape) * 32
        if isinstance(self.scale, QArray):
            return -(-bits // 8) + self.scale.nbytes
        assert isinstance(self.scheme.scale, Format)
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


def tile_counts(shape: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
    """How many tiles lie along each axis, a short last one counted."""
    return tuple(-(-n // t) for n, t in zip(shape, tile, strict=True))


def short_tiles(shape: tuple[int, ...], tile: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """`QArray.ragged` of an array of `shape`: axes from the end, whose last tile is short."""
    pairs = enumerate(zip(shape, tile, strict=True))
    return tuple((axis - len(shape), t) for axis, (n, t) in pairs if n % t)


def is_qarray(x: Any) -> bool:
    """Whether `x` is a `QArray`; for `is_leaf=`."""
    return isinstance(x, QArray)


def storage_of(q: QArray) -> np.dtype:
    """The dtype that the scheme and the layout of `q` give its codes."""
    if q.layout.packed is not None:
        return np.dtype(np.uint8)
    return np.dtype(np.int8) if q.layout.wide else q.scheme.values.storage


def in_memory(q: QArray) -> QArray:
    """`q` with its parts as JAX arrays, where some were to be read when asked for."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(np.asarray(x)), q)


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
    _check_scale(q)
    parts = {"scale": q.scale}
    for name, held in (("zero_point", q.scheme.zero_point), ("offset", q.scheme.centered or None)):
        part = getattr(q, name)
        if (part is None) != (held is None):
            raise ValueError(
                f"The scheme {q.scheme} and the {name} {type(part).__name__} disagree."
            )
    if q.zero_point is not None:
        parts["zero_point"] = q.zero_point
    for name, part in parts.items():
        fits = len(part.shape) == q.ndim and all(
            s > 0 and t > 0 and s == -(-n // t)
            for n, s, t in zip(q.stored_shape, part.shape, q.stored_tile, strict=False)
        )
        if not fits:
            raise ValueError(
                f"A {name} of shape {tuple(part.shape)} cannot tile codes of stored shape "
                f"{q.stored_shape}: the ranks must agree and each axis must divide."
            )


def _check_scale(q: QArray) -> None:
    scheme = q.scheme.scale
    if isinstance(scheme, Scheme) != isinstance(q.scale, QArray):
        raise TypeError(
            f"The scheme holds scales as {scheme}, but these are a {type(q.scale).__name__}."
        )
    if isinstance(q.scale, QArray):
        if q.scale.scheme != scheme:
            raise TypeError(
                f"The scheme holds scales as {scheme}, but these are held as {q.scale.scheme}."
            )
        check_qarray(q.scale)
    elif isinstance(scheme, Format) and q.scale.dtype != scheme.storage:
        raise TypeError(f"The scheme holds scales as {scheme}, but these are {q.scale.dtype}.")


def stored_codes(q: QArray, dtype: Any = None) -> Array:
    """The codes in stored order, one an element; those of integers as `dtype` where given."""
    if q.layout.packed is None:
        return q.codes if dtype is None else q.codes.astype(dtype)
    return unpack(q.codes, q.scheme.values, q.layout.packed, dtype)


def stored_values(q: QArray, dtype: Any) -> Array:
    """What the codes stand for before zero points and scales, in stored order, as `dtype`."""
    if q.scheme.values.integer:
        return stored_codes(q, dtype)
    return decode(stored_codes(q), q.scheme.values, dtype)


def scale_values(q: QArray) -> Float[Array, "..."]:
    """The scales of `q` in float32, in stored order, one a tile."""
    if isinstance(q.scale, QArray):
        return dequantize(q.scale, jnp.float32)
    assert isinstance(q.scheme.scale, Format)
    return decode(q.scale, q.scheme.scale, jnp.float32)


def with_plain_scale(q: QArray) -> QArray:
    """The same values with scales in float32 where they were held as codes: for moving tiles."""
    if not isinstance(q.scale, QArray):
        return q
    scheme = dataclasses.replace(q.scheme, scale=FLOAT32)
    return dataclasses.replace(q, scale=scale_values(q), scheme=scheme)


def spread(part: Array, tile: tuple[int, ...], shape: tuple[int, ...] | None = None) -> Array:
    """Repeats each scale over its tile, as a broadcast that XLA can fuse.

    `shape` is that of the codes, where the last tiles may be shorter than `tile`.
    """
    wide, full_shape = [], []
    for n, t in zip(part.shape, tile, strict=True):
        wide += [n, 1]
        full_shape += [n, t]
    full = jnp.broadcast_to(part.reshape(wide), full_shape)
    full = full.reshape([n * t for n, t in zip(part.shape, tile, strict=True)])
    if shape is None or full.shape == tuple(shape):
        return full
    return lax.slice(full, (0,) * full.ndim, tuple(shape))


def over_codes(q: QArray, part: Array) -> Array:
    """A scale, or a zero point, for each code of `q`, in stored order."""
    return spread(part, q.stored_tile, q.stored_shape)


def dequantize(q: QArray, dtype: Any = None) -> Float[Array, "..."]:
    """The array that `q` stands for: `(value - zero_point) * scale + offset` in float32.

    `dtype` defaults to `q.dtype`, the dtype of the array that was quantized.
    """
    check_qarray(q)
    values = stored_values(q, jnp.float32)
    if q.zero_point is not None:
        values = values - over_codes(q, q.zero_point.astype(jnp.float32))
    scale = over_codes(q, scale_values(q))
    if q.offset is None:
        values = values * scale
    else:
        values = offset_by(values * scale, q.offset)
    values = values.transpose(inverse(q.layout.permutation(q.ndim)))
    return values.astype(q.dtype if dtype is None else dtype)


def bytes_held(x: Any) -> int:
    """Packed bytes of an array or QArray, or of what stands for one (a shape and a dtype)."""
    if isinstance(x, QArray):
        return x.nbytes
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize
