"""Arrays as a checkpoint holds them: of a dtype that every NumPy has, two 4-bit codes a byte.

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

from ._errors import CheckpointError
from ._manifest import Packing, Part
from ._zarr import empty, ZarrArray

_FOUR_BITS = ("int4", "uint4", "float4_e2m1fn")


def packing_of(dtype: np.dtype) -> Packing:
    """How arrays of a dtype are stored."""
    if dtype.name in _FOUR_BITS:
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


def stored_shape(shape: tuple[int, ...], packing: str) -> tuple[int, ...]:
    """The shape of the stored array: with nibbles, the last axis halved or all of them flattened.

    The bytes are the same either way; a shape that keeps its axes can be read shard by shard.
    """
    if packing != "nibbles":
        return shape
    if shape and shape[-1] % 2 == 0:
        return (*shape[:-1], shape[-1] // 2)
    return (-(-math.prod(shape) // 2),)


def describe(array: Any, name: str) -> Part:
    """What the manifest says of an array that is stored under `name`."""
    dtype = np.dtype(array.dtype)
    shape = tuple(array.shape)
    packing = packing_of(dtype)
    if packing == "none":
        held = dtype
    else:
        held = np.dtype(f"uint{8 * dtype.itemsize}")
    stored = stored_shape(shape, packing)
    return Part(
        array=name,
        shape=shape,
        dtype=dtype.name,
        stored_shape=stored,
        stored_dtype=held.name,
        packing=packing,
        bytes=math.prod(stored) * held.itemsize,
    )


def to_stored(array: Any) -> np.ndarray:
    """The stored form of an array, on the host."""
    host = np.ascontiguousarray(_on_host(array)).reshape(array.shape)
    packing = packing_of(host.dtype)
    if packing == "none":
        return host
    if packing == "bits":
        return host.view(f"uint{8 * host.dtype.itemsize}")
    codes = host.reshape(-1).view(np.uint8)
    packed = codes[0::2] & np.uint8(15)
    packed[: codes.size // 2] |= codes[1::2] << np.uint8(4)
    return packed.reshape(stored_shape(host.shape, packing))


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
    if part.packing != "nibbles":
        return stored.read(region).view(dtype)
    if len(part.stored_shape) != len(part.shape) or part.shape[-1] % 2:
        # Flattened, with a nibble to spare: there are no regions of it.
        packed = stored.read((slice(0, part.stored_shape[0]),))
        return _unpacked(packed, dtype)[: math.prod(part.shape)].reshape(part.shape)[(*region, ...)]
    *lead, last = region
    bytes_read = slice(last.start // 2, -(-last.stop // 2))
    codes = _unpacked(stored.read((*lead, bytes_read)), dtype)
    skip = last.start - 2 * bytes_read.start
    return codes[..., skip : skip + last.stop - last.start]


def _unpacked(packed: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Two codes a byte as one code a byte, along the last axis; the low nibble is the first."""
    # ml_dtypes holds four bits in the low half of a byte, and zeros in the other.
    codes = empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.dtype(np.uint8))
    np.bitwise_and(packed, 15, out=codes[..., 0::2])
    np.right_shift(packed, 4, out=codes[..., 1::2])
    return codes.view(dtype)
