"""Arrays as a checkpoint holds them: of dtypes that every NumPy has, codes in their own bits.

The rules are those of docs/format.md, "Arrays".
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from ..numerics import is_narrow
from ._errors import CheckpointError
from ._manifest import Packing, Part
from ._zarr import empty, ZarrArray

# How many codes are taken apart into bits at a time; whole bytes for any number of bits.
_AT_ONCE = 1 << 20


def packing_of(dtype: np.dtype) -> Packing:
    """How arrays of a dtype are stored."""
    if is_narrow(dtype):
        return "nibbles"
    return "none" if dtype.isbuiltin == 1 else "bits"


def dtype_named(name: str) -> np.dtype:
    """The dtype of that name, NumPy's or ml_dtypes'.

    **Raises:** `CheckpointError` for a name that neither has.
    """
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise CheckpointError(
            f"The manifest names the dtype {name!r}, which neither NumPy nor ml_dtypes "
            f"{ml_dtypes.__version__} has. Install the version that wrote it."
        ) from None


def stored_shape(shape: tuple[int, ...], bits: int | None) -> tuple[int, ...]:
    """The shape of the stored array, `bits` an element: the last axis shorter, or all flattened.

    The bytes are the same either way; a shape that keeps its axes can be read shard by shard.
    """
    if bits is None:
        return shape
    if shape and shape[-1] * bits % 8 == 0:
        return (*shape[:-1], shape[-1] * bits // 8)
    return (-(-math.prod(shape) * bits // 8),)


def describe(array: Any, name: str, code_bits: int | None = None) -> Part:
    """What the manifest says of an array that is stored under `name`.

    Of elements of one byte, `code_bits` are stored where that is given.
    """
    dtype = np.dtype(array.dtype)
    shape = tuple(array.shape)
    packing = packing_of(dtype) if code_bits is None else "bitstring"
    if packing == "none":
        held = dtype
    else:
        held = np.dtype(f"uint{8 * dtype.itemsize}")
    stored = stored_shape(shape, 4 if packing == "nibbles" else code_bits)
    return Part(
        array=name,
        shape=shape,
        dtype=dtype.name,
        stored_shape=stored,
        stored_dtype=held.name,
        packing=packing,
        bytes=math.prod(stored) * held.itemsize,
        code_bits=code_bits,
    )


def to_stored(array: Any, code_bits: int | None = None) -> np.ndarray:
    """The stored form of an array, on the host."""
    host = np.ascontiguousarray(_on_host(array)).reshape(array.shape)
    if code_bits is not None:
        packed = to_bitstring(host.reshape(-1).view(np.uint8), code_bits)
        return packed.reshape(stored_shape(host.shape, code_bits))
    packing = packing_of(host.dtype)
    if packing == "none":
        return host
    if packing == "bits":
        return host.view(f"uint{8 * host.dtype.itemsize}")
    codes = host.reshape(-1).view(np.uint8)
    packed = codes[0::2] & np.uint8(15)
    packed[: codes.size // 2] |= codes[1::2] << np.uint8(4)
    return packed.reshape(stored_shape(host.shape, 4))


def to_bitstring(codes: np.ndarray, bits: int) -> np.ndarray:
    """The lowest `bits` of each byte, one after the other, the first in the lowest bits."""
    result = np.zeros(-(-codes.size * bits // 8), np.uint8)
    for start in range(0, codes.size, _AT_ONCE):
        piece = codes[start : start + _AT_ONCE]
        string = np.unpackbits(piece[:, None], axis=1, count=bits, bitorder="little")
        packed = np.packbits(string.reshape(-1), bitorder="little")
        result[start * bits // 8 :][: packed.size] = packed
    return result


def from_bitstring(packed: np.ndarray, bits: int, count: int, signed: bool) -> np.ndarray:
    """Undoes `to_bitstring` for `count` codes, extending signs; one code a byte."""
    result = empty((count,), np.dtype(np.uint8))
    for start in range(0, count, _AT_ONCE):
        size = min(_AT_ONCE, count - start)
        piece = packed[start * bits // 8 : -(-(start + size) * bits // 8)]
        string = np.unpackbits(piece, count=size * bits, bitorder="little").reshape(size, bits)
        codes = np.packbits(string, axis=1, bitorder="little")[:, 0]
        if signed:
            half = np.uint8(2 ** (bits - 1))
            codes = (codes ^ half) - half
        result[start : start + size] = codes
    return result


def _on_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array):
        devices = array.devices()
        shares_memory = len(devices) == 1 and all(d.platform == "cpu" for d in devices)
        if not shares_memory or packing_of(np.dtype(array.dtype)) == "nibbles":
            # An array keeps the host copy that is made of it. Made of a copy on the device, it
            # is gone with it, so that saving leaves no second model in the host's memory.
            array = jnp.copy(array)
    return np.asarray(array)


def read_part(folder: Path, part: Part, sharding: Sharding | None) -> jax.Array:
    """The array that is stored in `folder`; on the default device if `sharding` is `None`.

    Of a sharded array, each process reads what its devices hold, shard by shard.

    **Raises:** `CheckpointError` if what is stored is not what the manifest promises.
    """
    if part.bytes == 0:
        # Orbax stores no arrays without elements.
        none = jnp.zeros(part.shape, dtype_named(part.dtype))
        return none if sharding is None else jax.device_put(none, sharding)
    stored = ZarrArray(folder / part.array)
    if (stored.shape, stored.dtype.name) != (part.stored_shape, part.stored_dtype):
        raise CheckpointError(
            f"The array {part.array} is {stored.dtype}{list(stored.shape)}, but the manifest says "
            f"{part.stored_dtype}{list(part.stored_shape)}. It was not written with this manifest: "
            "use another copy."
        )

    def region(index: tuple[slice, ...] | None) -> np.ndarray:
        index = (slice(None),) * len(part.shape) if index is None else index
        slices = [slice(*i.indices(n)[:2]) for i, n in zip(index, part.shape, strict=True)]
        return _read_region(stored, part, tuple(slices))

    if sharding is None:
        result = jnp.asarray(region(None))
    else:
        result = jax.make_array_from_callback(part.shape, sharding, region)
    if result.dtype != dtype_named(part.dtype):
        raise CheckpointError(
            f"The array {part.array} is {part.dtype}, which JAX would turn into {result.dtype}. "
            'Enable 64-bit types first: jax.config.update("jax_enable_x64", True).'
        )
    return result


def _read_region(stored: ZarrArray, part: Part, region: tuple[slice, ...]) -> np.ndarray:
    dtype = dtype_named(part.dtype)
    bits = 4 if part.packing == "nibbles" else part.code_bits
    if bits is None:
        return stored.read(region).view(dtype)

    def unpacked(packed: np.ndarray) -> np.ndarray:
        if part.packing == "nibbles":
            return _unpacked(packed, dtype)
        count = packed.size * 8 // bits
        codes = from_bitstring(packed.reshape(-1), bits, count, dtype.kind == "i").view(dtype)
        return codes.reshape(*packed.shape[:-1], -1)

    if len(part.stored_shape) != len(part.shape) or part.shape[-1] * bits % 8:
        # Flattened, with bits to spare: there are no regions of it.
        packed = stored.read((slice(0, part.stored_shape[0]),))
        return unpacked(packed)[: math.prod(part.shape)].reshape(part.shape)[(*region, ...)]
    *lead, last = region
    # Whole runs of eight codes fill whole bytes.
    start, stop = last.start // 8 * 8, min(-(-last.stop // 8) * 8, part.shape[-1])
    codes = unpacked(stored.read((*lead, slice(start * bits // 8, stop * bits // 8))))
    return codes[..., last.start - start : last.stop - start]


def _unpacked(packed: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Two codes a byte as one code a byte, along the last axis; the low nibble is the first."""
    # ml_dtypes holds four bits in the low half of a byte, and zeros in the other.
    codes = empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.dtype(np.uint8))
    np.bitwise_and(packed, 15, out=codes[..., 0::2])
    np.right_shift(packed, 4, out=codes[..., 1::2])
    return codes.view(dtype)
