"""A GGUF header, read without trusting any number in it.

The package `gguf` maps the file and follows its counts as they come: a count of 2^63 makes it run
for hours. Here every count is compared with the bytes that are left before anything is done with
it, so reading takes time and memory in proportion to the header at most.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import struct
from collections.abc import Mapping
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ._errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (
    2,
    3,
)  # Version 1 has 32-bit lengths; no file of it has been written since August 2023.
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_MAX_NESTING = 4  # Arrays of arrays: no writer goes deeper than 2.
_SMALLEST_ENTRY = 8 + 4 + 1  # A key's length, the type, a value of one byte.
_SMALLEST_TENSOR = 8 + 4 + 4 + 8  # Name length, dimension count, type, offset.
_LENGTH = struct.Struct("<Q")
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies, and how. All numbers are checked against the file."""

    name: str
    shape: tuple[
        int, ...
    ]  # As NumPy orders it: the last axis is contiguous, [out, in] for a matrix.
    type: GGMLQuantizationType
    start: int  # Bytes from the beginning of the file.
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file says of itself."""

    metadata: Mapping[str, Any]  # Scalars as int, float, bool, str; arrays as lists.
    tensors: Mapping[str, TensorInfo]


class _Cursor:
    """A position in the file's bytes that cannot leave them."""

    def __init__(self, data: memoryview, path: str):
        self.data = data
        self.at = 0
        self.path = path

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: at byte {self.at}, {problem}. The file is damaged or cut short: fetch "
            f"it again."
        )

    def take(self, count: int, what: str) -> memoryview:
        if count > self.left:
            raise self.fail(f"{what} needs {count} bytes and the file has {self.left} left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, what: str, smallest: int, limit: int | None = None) -> int:
        """A 64-bit count of things of at least `smallest` bytes each, all of which must fit in
        what is left.
        """
        count = self.number("Q", f"the number of {what}")
        most = self.left // smallest
        if limit is not None:
            most = min(most, limit)
        if count > most:
            raise self.fail(f"the number of {what} is {count}, and at most {most} can be there")
        return count

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        # One loop without calls: a vocabulary and its merges are 100,000 strings.
        texts = []
        end = len(self.data)
        for _ in range(count):
            if end - self.at < 8:
                raise self.fail(f"{what} needs 8 bytes for its length, and {self.left} are left")
            (length,) = _LENGTH.unpack_from(self.data, self.at)
            self.at += 8
            if length > end - self.at:
                raise self.fail(f"the number of bytes in {what} is {length}, of {self.left} left")
            raw = self.data[self.at : self.at + length]
            self.at += length
            try:
                texts.append(str(raw, "utf-8"))
            except UnicodeDecodeError as error:
                raise self.fail(f"{what} is not UTF-8 ({error.reason})") from None
        return texts

    def value_type(self, what: str) -> GGUFValueType:
        code = self.number("I", f"the type of {what}")
        try:
            return GGUFValueType(code)
        except ValueError:
            raise self.fail(
                f"{what} has type {code}, and GGUF knows 0 to {max(GGUFValueType)}"
            ) from None

    def value(self, kind: GGUFValueType, what: str, depth: int = 0) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string(what)
        if kind != GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind], what)
        if depth == _MAX_NESTING:
            raise self.fail(f"{what} nests arrays deeper than {_MAX_NESTING}")
        item = self.value_type(f"the items of {what}")
        if item in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[item])
            count = self.count(f"items in {what}", size)
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(count * size, what)))
        if item == GGUFValueType.STRING:
            return self.strings(self.count(f"items in {what}", 8), what)
        count = self.count(f"items in {what}", 12)
        return [self.value(item, what, depth + 1) for _ in range(count)]


def read_header(data: memoryview, path: str) -> Header:
    """The header of the GGUF file whose bytes are `data`; `path` is for messages.

    Raises:
      CheckpointError: not a GGUF, an unknown version or type, or any length, count, dimension or
        offset that does not fit in the file.
    """
    cursor = _Cursor(data, path)
    magic = bytes(cursor.take(4, "the magic"))
    if magic != _MAGIC:
        raise CheckpointError(
            f"{path} starts with {magic!r}, and a GGUF file with {_MAGIC!r}. Is it another format?"
        )
    version = cursor.number("I", "the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        hint = "It is big-endian: convert" if swapped in _VERSIONS else "Convert"
        raise CheckpointError(
            f"{path} has GGUF version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]}, "
            f"little-endian, can be read. "
            f"{hint} it with a current llama.cpp."
        )
    tensor_count = cursor.count("tensors", _SMALLEST_TENSOR)
    entry_count = cursor.count("metadata entries", _SMALLEST_ENTRY)
    metadata: dict[str, Any] = {}
    for index in range(entry_count):
        key = cursor.string(f"the key of metadata entry {index}")
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.value_type(repr(key)), repr(key))
    entries = [_tensor_entry(cursor, index) for index in range(tensor_count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r}, and a power of two is wanted")
    return Header(metadata=metadata, tensors=_place(cursor, entries, alignment))


def _tensor_entry(
    cursor: _Cursor, index: int
) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = cursor.string(f"the name of tensor {index}")
    what = f"tensor {name!r}"
    dimensions = cursor.number("I", f"the number of dimensions of {what}")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise cursor.fail(
            f"{what} has {dimensions} dimensions, and 1 to {_MAX_DIMENSIONS} are possible"
        )
    sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, f"the shape of {what}"))
    code = cursor.number("I", f"the type of {what}")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise cursor.fail(f"{what} has the unknown type {code}") from None
    offset = cursor.number("Q", f"the offset of {what}")
    # GGUF lists the contiguous axis first.
    return name, tuple(reversed(sizes)), kind, offset


def _place(
    cursor: _Cursor,
    entries: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]],
    alignment: int,
) -> dict[str, TensorInfo]:
    data_start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise cursor.fail(f"tensor {name!r} appears twice")
        if 0 in shape:
            raise cursor.fail(f"tensor {name!r} has shape {list(shape)}, and no axis may be empty")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise cursor.fail(
                f"tensor {name!r} has rows of {shape[-1]}, which blocks of {block} ({kind.name}) "
                f"do not fill"
            )
        if offset % alignment:
            raise cursor.fail(
                f"tensor {name!r} is at offset {offset}, which is no multiple of {alignment}"
            )
        nbytes = math.prod(shape) // block * block_bytes
        start = data_start + offset
        if start + nbytes > len(cursor.data):
            raise CheckpointError(
                f"{cursor.path}: tensor {name!r}, {kind.name}{list(shape)}, ends at byte "
                f"{start + nbytes} and the file has "
                f"{len(cursor.data)}. The file is damaged or cut short: fetch it again."
            )
        tensors[name] = TensorInfo(name=name, shape=shape, type=kind, start=start, nbytes=nbytes)
    ordered = sorted(tensors.values(), key=lambda tensor: tensor.start)
    for before, after in zip(ordered, ordered[1:], strict=False):
        if before.start + before.nbytes > after.start:
            raise cursor.fail(f"tensors {before.name!r} and {after.name!r} overlap")
    return tensors
