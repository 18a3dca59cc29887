"""Tensors of a PyTorch file (`.pt`, `.pth`, `.bin`), read without executing anything in it.

`torch.save` writes a pickle that says which tensors there are, and their numbers beside it: since
PyTorch 1.6 as entries of a zip archive, before that one after the other behind the pickle. Formats
and reasons: https://docs.pytorch.org/docs/stable/notes/serialization.html and
`torch.serialization._legacy_load`.
"""

import dataclasses
import functools
import math
import mmap
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from ._errors import CheckpointError
from ._lazy import LazyArray
from ._torch_pickle import read_pickle, Storage, View

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MOST_AXES = 32
_LARGEST_EMPTY = 1 << 40  # Elements, were the axes of length 0 of length 1.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchTensor:
    """Where one tensor lies, and how. All numbers are checked against the file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int  # Bytes from the beginning of the file.
    strides: tuple[int, ...]  # In bytes.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TorchFile:
    """An opened PyTorch file. Its pickle is read; the file stays mapped while this lives."""

    path: Path
    tensors: Mapping[str, TorchTensor]
    others: tuple[str, ...]  # Names of what is no tensor, and is left alone.
    data: np.ndarray  # The whole file as uint8, mapped.

    def lazy(self, name: str) -> LazyArray:
        """Tensor `name` in the dtype it is stored in.

        Raises:
          CheckpointError: there is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r} among its {len(self.tensors)}. "
                f"The file is of another model than was wanted: fetch the right one."
            )
        tensor = self.tensors[name]
        return LazyArray(
            shape=tensor.shape,
            dtype=tensor.dtype,
            load=functools.partial(_read_tensor, self.data, tensor),
            name=name,
        )

    def describe(self) -> str:
        """The types of its tensors, commonest first: `float32/int64 PyTorch file`."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.dtype.name] = counts.get(tensor.dtype.name, 0) + 1
        return f"{'/'.join(sorted(counts, key=lambda name: -counts[name]))} PyTorch file"


def open_torch(path: str | Path, *, key: str | None = None) -> TorchFile:
    """The PyTorch file at `path`: a dict of tensors by name, as `state_dict()` gives it.

    Args:
      key: if the dict of tensors is itself a value of a dict, its key there, as "state_dict".

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: it is not a sound PyTorch file, or holds anything that could run code.
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            raise CheckpointError(
                f"{path} is empty, and a PyTorch file was wanted. Fetch it again."
            )
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    read = _read_zip if mapped[:4] == _ZIP_MAGIC else _read_legacy
    content, starts = read(mapped, str(path))
    if key is not None:
        if not isinstance(content, dict) or key not in content:
            raise CheckpointError(f"{path} has no {key!r}: it holds {_what(content)}.")
        content = content[key]
    if not isinstance(content, dict) or not any(isinstance(v, View) for v in content.values()):
        raise CheckpointError(
            f"{path} should hold a dict of tensors and holds {_what(content)}. If one of these is "
            f"it, open the file with key=."
        )
    tensors, others = {}, []
    for name, value in content.items():
        if isinstance(value, View) and isinstance(name, str):
            tensors[name] = _place(value, starts[value.storage.key], str(path), name)
        else:
            others.append(str(name))
    data = np.frombuffer(mapped, np.uint8)
    return TorchFile(path=path, tensors=tensors, others=tuple(others), data=data)


def _what(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    shown = ", ".join(f"{str(name)!r:.40}" for name in list(content)[:5])
    return f"a dict of {len(content)} ({shown}{', ...' if len(content) > 5 else ''})"


def _read_legacy(mapped: mmap.mmap, path: str) -> tuple[Any, dict[str, int]]:
    """The pickled object, and the first byte of each storage."""
    at, size = 0, len(mapped)
    # Looked at before anything is followed, so that any other file is called what it is.
    if mapped[:1] != b"\x80":
        raise CheckpointError(
            f"{path} starts with {mapped[:4]!r}: neither a zip archive nor a pickle, so it is no "
            f"PyTorch file. Is it another format?"
        )
    wanted = {"magic number": _LEGACY_MAGIC, "protocol": _LEGACY_PROTOCOL}
    for what, number in wanted.items():
        found, at = read_pickle(mapped, at, size, path)
        if type(found) is not int or found != number:
            raise CheckpointError(
                f"{path} is a pickle without PyTorch's {what} {number}. Is it another format?"
            )
    system, at = read_pickle(mapped, at, size, path)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path} was written on a big-endian machine. Save it on another.")
    content, at = read_pickle(mapped, at, size, path)
    storages = _storages(content, path)
    keys, at = read_pickle(mapped, at, size, path)
    if not isinstance(keys, list) or any(type(key) is not str for key in keys):
        raise CheckpointError(f"{path} does not list its storages. Fetch it again.")
    starts = {}
    for key in keys:
        # A storage that only what we leave alone refers to cannot be stepped over: its type, and
        # with it its size, is not known.
        if key not in storages:
            raise CheckpointError(
                f"{path}: storage {key!r:.40} belongs to no tensor of it. Fetch it again."
            )
        storage = storages[key]
        count = int.from_bytes(mapped[at : at + 8], "little", signed=True)
        if at + 8 > size or count != storage.count:
            raise CheckpointError(
                f"{path}: at byte {at}, storage {key!r:.40} should have {storage.count} elements, "
                f"and {size - at} bytes are left. The file is damaged or cut short: fetch it again."
            )
        starts[key] = at + 8
        at = _end(at + 8, storage, size, path)
    _require_all(storages, starts, path)
    return content, starts


def _read_zip(mapped: mmap.mmap, path: str) -> tuple[Any, dict[str, int]]:
    """The pickled object, and the first byte of each storage."""
    entries = _zip_entries(mapped, path)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path} is a zip archive with {len(pickles)} entries NAME/data.pkl, and a PyTorch "
            f"file has one. Is it another format?"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if folder + "byteorder" in entries:
        start, end = entries[folder + "byteorder"]
        if mapped[start:end] != b"little":
            raise CheckpointError(f"{path} was written big-endian. Save it on another machine.")
    content, _ = read_pickle(mapped, *entries[pickles[0]], path)
    storages = _storages(content, path)
    starts = {}
    for key, storage in storages.items():
        if f"{folder}data/{key}" in entries:
            start, end = entries[f"{folder}data/{key}"]
            _end(start, storage, end, path)
            starts[key] = start
    _require_all(storages, starts, path)
    return content, starts


def _zip_entries(mapped: mmap.mmap, path: str) -> dict[str, tuple[int, int]]:
    """Name to first byte and end of each entry; all are stored, none is compressed."""
    try:
        # A mapped file has all that is needed of a file to list an archive.
        with zipfile.ZipFile(cast(Any, mapped)) as archive:
            listed = archive.infolist()
    # What `zipfile` raises for an archive that is not sound, found by changing bytes of one.
    except (
        *(zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError),
        *(ValueError, struct.error, OSError, EOFError, OverflowError),
    ) as error:
        raise CheckpointError(
            f"{path} is no sound zip archive ({str(error):.120}). The file is damaged or cut "
            f"short: fetch it again."
        ) from None
    entries: dict[str, tuple[int, int]] = {}
    for entry in listed:
        at = entry.header_offset
        name = entry.filename
        problem = None
        if name in entries:
            problem = "appears twice"
        elif entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            problem = "is compressed, which PyTorch never does"
        elif entry.flag_bits & 1:
            problem = "is encrypted"
        elif not 0 <= at <= len(mapped) - _LOCAL_HEADER.size or entry.file_size < 0:
            problem = f"is said to be at byte {at} of {len(mapped)}"
        else:
            magic, name_length, extra_length = _LOCAL_HEADER.unpack_from(mapped, at)
            start = at + _LOCAL_HEADER.size + name_length + extra_length
            entries[name] = start, start + entry.file_size
            if magic != _ZIP_MAGIC:
                problem = f"does not begin at byte {at}"
            elif entries[name][1] > len(mapped):
                problem = f"ends at byte {entries[name][1]} of {len(mapped)}"
        if problem is not None:
            raise CheckpointError(
                f"{path}: the zip entry {name!r:.80} {problem}. The file is damaged: fetch it "
                f"again."
            )
    return entries


def _storages(content: Any, path: str) -> dict[str, Storage]:
    """Every storage that `content` mentions, which must agree with each other."""
    storages: dict[str, Storage] = {}
    seen: set[int] = set()
    left = [content]
    # Values may be shared, and even hold themselves: each is looked into once.
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list | tuple):
            left.extend(value)
        elif isinstance(value, View):
            left.append(value.storage)
        elif isinstance(value, Storage):
            same = storages.setdefault(value.key, value)
            if type(value.count) is not int or value.count < 0:
                raise CheckpointError(
                    f"{path}: storage {value.key!r:.40} has no sound number of elements. Fetch the "
                    f"file again."
                )
            if (same.dtype, same.count) != (value.dtype, value.count):
                raise CheckpointError(
                    f"{path}: storage {value.key!r:.40} is once {same.dtype}[{same.count}] and "
                    f"once {value.dtype}[{value.count}]. Fetch the file again."
                )
    return storages


def _require_all(storages: dict[str, Storage], starts: dict[str, int], path: str) -> None:
    missing = sorted(storages.keys() - starts.keys())
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of its {len(storages)} storages ({missing[0]!r:.40}). "
            f"The file is damaged or cut short: fetch it again."
        )


def _end(start: int, storage: Storage, limit: int, path: str) -> int:
    end = start + storage.count * storage.dtype.itemsize
    if end > limit:
        raise CheckpointError(
            f"{path}: storage {storage.key!r:.40}, {storage.dtype}[{storage.count}], ends at byte "
            f"{end} and there are {limit}. The file is damaged or cut short: fetch it again."
        )
    return end


def _place(view: View, start: int, path: str, name: str) -> TorchTensor:
    storage, shape, strides = view.storage, view.shape, view.strides
    problem = None
    if len(shape) != len(strides) or len(shape) > _MOST_AXES:
        problem = f"has {len(shape)} axes and {len(strides)} strides (at most {_MOST_AXES})"
    elif min((0, *shape, *strides, view.offset)) < 0:
        problem = "has a negative size, stride or offset"
    elif max((0, *shape)) > _LARGEST_EMPTY or math.prod(max(n, 1) for n in shape) > max(
        storage.count, _LARGEST_EMPTY if 0 in shape else 0
    ):
        problem = f"has more elements than its storage, which has {storage.count}"
    elif 0 not in shape:
        last = view.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if last >= storage.count:
            problem = f"reaches element {last} of a storage of {storage.count}"
    if problem is not None:
        raise CheckpointError(
            f"{path}: tensor {name!r:.80} {problem}. The file is damaged, or the tensor repeats "
            f"elements: save its .contiguous()."
        )
    size = storage.dtype.itemsize
    empty = 0 in shape
    return TorchTensor(
        shape=shape,
        dtype=storage.dtype,
        start=start if empty else start + view.offset * size,
        strides=tuple(0 if n < 2 else step * size for n, step in zip(shape, strides, strict=True)),
    )


def _read_tensor(data: np.ndarray, tensor: TorchTensor) -> np.ndarray:
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, tensor.dtype)
    # Any byte but 0 is true, and NumPy counts on 1.
    dtype = np.dtype(np.uint8) if tensor.dtype == np.bool_ else tensor.dtype
    view = np.ndarray(tensor.shape, dtype, data, offset=tensor.start, strides=tensor.strides)
    # A copy: the result must not keep the mapping alive, nor change with the file.
    return view != 0 if tensor.dtype == np.bool_ else view.copy(order="C")
