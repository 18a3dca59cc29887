"""Where a parameter lies in a foreign file, and what must be done to it on the way."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from ..checkpoint import (
    CheckpointError,
    LazyArray,
    open_huggingface,
    open_torch,
    read_json,
)

# Stored [out, in]; ours are [in, out].
TRANSPOSED = (1, 0)
# PyTorch stores [out, in, height, width]; Flax [height, width, in, out].
CONVOLUTION = (2, 3, 1, 0)

_TORCH_FILE = "pytorch_model.bin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The foreign tensor that one parameter comes from."""

    name: str
    axes: tuple[int, ...] | None = None  # Its axes in our order. `None`: as they are.
    interleaved_heads: int | None = (
        None  # Rows of so many heads are in llama.cpp's order. `None`: in ours.
    )


@runtime_checkable
class Tensors(Protocol):
    """An opened file or folder: `GGUFFile`, `HuggingFaceFolder` or `TorchFile`."""

    @property
    def tensors(self) -> Collection[str]: ...

    def lazy(self, name: str) -> LazyArray: ...

    def describe(self) -> str: ...


def open_folder(path: str | Path) -> tuple[Mapping[str, Any], Tensors]:
    """config.json and the weights beside it: safetensors, or `pytorch_model.bin` where there are
    none, of which nothing is executed.

    Raises:
      FileNotFoundError: there is no such folder.
      CheckpointError: a file is missing or damaged.
    """
    path = Path(path)
    if not (path / _TORCH_FILE).is_file() or any(path.glob("*.safetensors")):
        folder = open_huggingface(path)
        return folder.config, folder
    return read_json(path / "config.json"), open_torch(path / _TORCH_FILE)


def lazy_tree(
    shapes: Mapping[str, Any],
    origins: Mapping[tuple[str, ...], Origin],
    file: Tensors,
    *,
    where: str,
    unused: Callable[[str], bool],
) -> dict[str, Any]:
    """Variables of a Linen model with a `LazyArray` for each.

    Args:
      shapes: the variables with shapes in place of numbers, as `jax.eval_shape` of `init` gives.
      origins: for each path in `shapes`, where it lies in `file`.
      where: what messages call the file.
      unused: whether a tensor of the file that no parameter wants may be left out.

    Raises:
      CheckpointError: a tensor is missing, has another shape than the model's, or is one we do not
        know.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(dict(shapes))
    flat = {tuple(part.key for part in path): leaf for path, leaf in leaves}
    if flat.keys() != origins.keys():
        raise AssertionError(
            f"The weight map and the model disagree on {flat.keys() ^ origins.keys()}."
        )
    refuse_strange(origins.values(), file, where=where, unused=unused)
    read = [
        lazy_leaf(file.lazy(origins[path].name), origins[path], leaf, where)
        for path, leaf in flat.items()
    ]
    return jax.tree_util.tree_unflatten(structure, read)


def refuse_strange(
    origins: Collection[Origin], file: Tensors, *, where: str, unused: Callable[[str], bool]
) -> None:
    """Sees to it that nothing of `file` is left out that `unused` does not name.

    Raises:
      CheckpointError: it holds a tensor that we do not know.
    """
    known = {origin.name for origin in origins}
    strange = sorted(name for name in file.tensors if name not in known and not unused(name))
    if strange:
        shown = ", ".join(map(repr, strange[:3]))
        raise CheckpointError(
            f"{where} holds {len(strange)} tensors that this architecture does not have ({shown}). "
            f"It would give wrong numbers without them: use a model of a supported architecture."
        )


def lazy_leaf(stored: LazyArray, origin: Origin, leaf: Any, where: str) -> LazyArray:
    """`stored` with the shape and dtype of the parameter `leaf`.

    Raises:
      CheckpointError: their shapes do not fit.
    """
    axes = origin.axes
    wanted = tuple(leaf.shape)
    if axes is not None:
        # The stored axis `axes[i]` becomes our axis `i`.
        wanted = tuple(leaf.shape[axes.index(axis)] for axis in range(len(axes)))
    if stored.shape != wanted:
        raise CheckpointError(
            f"{where}: tensor {origin.name!r} has shape {list(stored.shape)}, and the model's "
            f"sizes want {list(wanted)}. "
            f"The file is damaged or its config is of another model: fetch it again."
        )
    dtype = np.dtype(leaf.dtype)

    def load() -> np.ndarray:
        # Checked here, under the name and indices that the file has, and before a cast could
        # overflow.
        array = stored.read()
        if origin.interleaved_heads is not None:
            array = _deinterleave(array, origin.interleaved_heads)
        return np.ascontiguousarray(array if axes is None else array.transpose(axes), dtype=dtype)

    return LazyArray(shape=tuple(leaf.shape), dtype=dtype, load=load, name=origin.name)


def _deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows `(pair, member)` of each head, as llama.cpp has them, in the order `(member, pair)`."""
    split = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)
