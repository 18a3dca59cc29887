"""Reading the Zarr arrays that Orbax wrote: chunks are not compressed, so they are plain bytes.

Zarr version 2: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html
"""

import itertools
import math
from pathlib import Path

import msgspec
import numpy as np

from ._errors import CheckpointError

# XLA takes over host memory that is aligned so, instead of copying it.
_ALIGNMENT = 64


class _Meta(msgspec.Struct, frozen=True):
    """`.zarray`; for arrays without axes, Orbax writes one chunk without axes."""

    zarr_format: int
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    compressor: None
    filters: None
    order: str
    dimension_separator: str = "."


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that JAX can take over without a copy, where devices share the host's memory."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


class ZarrArray:
    """A Zarr array in a folder. Nothing is read before a region is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.meta = msgspec.json.decode((folder / ".zarray").read_bytes(), type=_Meta)
            self.dtype = np.dtype(self.meta.dtype)
        except (OSError, TypeError, msgspec.MsgspecError) as error:
            raise CheckpointError(
                f"{folder} holds no Zarr array that can be read: {error}"
            ) from None
        meta = self.meta
        if (meta.zarr_format, meta.order) != (2, "C") or len(meta.chunks) != len(meta.shape):
            raise CheckpointError(
                f"{folder} holds a Zarr array of format {meta.zarr_format}, order {meta.order!r} "
                f"and chunks {list(meta.chunks)}; format 2 in C order is what checkpoints hold."
            )
        self.shape = meta.shape

    def read(self, region: tuple[slice, ...]) -> np.ndarray:
        """The elements in a region, given by a slice with start and stop for each axis.

        **Raises:** `CheckpointError` naming a chunk that is missing or of another size.
        """
        native = self.dtype.newbyteorder("=")
        out = empty(tuple(s.stop - s.start for s in region), native)
        if out.size == 0:
            return out
        ranges = [
            range(s.start // size, -(-s.stop // size))
            for s, size in zip(region, self.meta.chunks, strict=True)
        ]
        for place in itertools.product(*ranges):
            into, source = [], []
            for at, size, wanted in zip(place, self.meta.chunks, region, strict=True):
                start, stop = max(wanted.start, at * size), min(wanted.stop, (at + 1) * size)
                into.append(slice(start - wanted.start, stop - wanted.start))
                source.append(slice(start - at * size, stop - at * size))
            out[(*into, ...)] = self._chunk(place)[(*source, ...)]
        return out

    def _chunk(self, place: tuple[int, ...]) -> np.ndarray:
        # An array without axes has one chunk, named 0.
        name = self.meta.dimension_separator.join(map(str, place)) or "0"
        path = self.folder / name
        wanted = math.prod(self.meta.chunks) * self.dtype.itemsize
        try:
            if path.stat().st_size != wanted:
                raise CheckpointError(
                    f"{path} has {path.stat().st_size} bytes, and a chunk has {wanted}. Use "
                    "another copy of the checkpoint."
                )
            flat = np.fromfile(path, self.dtype)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
        return flat.reshape(self.meta.chunks)
