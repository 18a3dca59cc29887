"""GGUF files, as llama.cpp writes them: metadata, and tensors dequantized on request."""

import dataclasses
import functools
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from ._errors import CheckpointError
from ._gguf_header import Header, read_header, TensorInfo
from ._lazy import LazyArray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GGUFFile:
    """An opened GGUF file. Only its header is in memory; the file stays mapped while this lives."""

    path: Path
    header: Header
    data: np.ndarray  # The whole file as uint8, mapped.

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Key to value: int, float, bool, str or list."""
        return self.header.metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name to shape, type and place."""
        return self.header.tensors

    def lazy(self, name: str) -> LazyArray:
        """Tensor `name` as float32, dequantized when read.

        Raises:
          CheckpointError: there is no such tensor, or (when read) its type cannot be dequantized.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r} among its {len(self.tensors)}. "
                f"The file is incomplete, or of another architecture than it says: fetch it again."
            )
        info = self.tensors[name]
        return LazyArray(
            shape=info.shape,
            dtype=np.dtype(np.float32),
            load=functools.partial(_dequantize, self.data, info, str(self.path)),
            name=name,
        )

    def describe(self) -> str:
        """The types of its tensors of two axes or more, commonest first: `dequantized Q4_1/Q8_0
        GGUF`.
        """
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            if len(tensor.shape) > 1:
                sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.nbytes
        names = sorted(sizes, key=lambda name: -sizes[name])
        exact = set(names) <= {"F32", "F16", "BF16"}
        return f"{'' if exact else 'dequantized '}{'/'.join(names)} GGUF"


def open_gguf(path: str | Path) -> GGUFFile:
    """The GGUF file at `path`, its whole header checked.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: it is not a sound GGUF file.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            raise CheckpointError(f"{path} is empty, and a GGUF file was wanted. Fetch it again.")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(mapped, np.uint8)
    return GGUFFile(path=path, header=read_header(memoryview(mapped), str(path)), data=data)


def _dequantize(data: np.ndarray, info: TensorInfo, path: str) -> np.ndarray:
    raw = data[info.start : info.start + info.nbytes]
    if info.type == GGMLQuantizationType.F32:
        # A copy: the result must not keep the mapping alive, nor change with the file.
        return raw.view("<f4").reshape(info.shape).copy()
    rows = raw.reshape(*info.shape[:-1], -1)
    try:
        values = dequantize(rows, info.type)
    except NotImplementedError:
        raise CheckpointError(
            f"{path}: tensor {info.name!r} is {info.type.name}, which the package gguf cannot "
            f"dequantize. "
            f"Use a file of another type (Q8_0, Q4_K_M, ...)."
        ) from None
    return np.ascontiguousarray(values, np.float32).reshape(info.shape)
