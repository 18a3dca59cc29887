"""Hugging Face model folders: config.json, safetensors (one file, or shards with an index),
tokenizer.json.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open, SafetensorError

from ._errors import CheckpointError
from ._lazy import LazyArray

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What `snapshot_download` fetches: never pickles.
_WANTED = (
    "config.json",
    "*.safetensors",
    _INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies, and how."""

    file: Path
    shape: tuple[int, ...]
    type: str  # As safetensors calls it: "BF16".


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HuggingFaceFolder:
    """An opened folder. Headers are read; tensors stay in their files."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def lazy(self, name: str) -> LazyArray:
        """Tensor `name` in the dtype it is stored in.

        Raises:
          CheckpointError: there is no such tensor, or it does not hold floating-point numbers.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r} among its {len(self.tensors)}. "
                f"A shard is missing, or config.json is of another model: fetch the folder again."
            )
        stored = self.tensors[name]
        if stored.type not in _FLOATS:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is {stored.type}, and {', '.join(_FLOATS)} can be "
                f"read. "
                f"Use the unquantized model."
            )
        return LazyArray(
            shape=stored.shape,
            dtype=_FLOATS[stored.type],
            load=functools.partial(_read_tensor, stored, name),
            name=name,
        )

    def describe(self) -> str:
        """The types of its tensors, commonest first: `BF16 safetensors`."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.type] = counts.get(tensor.type, 0) + 1
        return f"{'/'.join(sorted(counts, key=lambda name: -counts[name]))} safetensors"


def open_huggingface(path: str | Path) -> HuggingFaceFolder:
    """The model folder at `path`, headers checked.

    Raises:
      FileNotFoundError: there is no such folder.
      CheckpointError: a file is missing or damaged, the index names a file outside the folder, or
        the weights are pickles (`.bin`), which can run code and are never opened.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is not a folder. Give a folder with config.json and safetensors."
        )
    config = read_huggingface_config(path / "config.json")
    tensors: dict[str, StoredTensor] = {}
    if (path / _SINGLE).is_file():
        tensors.update(_file_tensors(path / _SINGLE))
    elif (path / _INDEX).is_file():
        tensors.update(_sharded_tensors(path))
    else:
        pickles = sorted(
            file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth")
        )
        found = (
            f"only pickles ({', '.join(pickles)}), which are never opened" if pickles else "neither"
        )
        raise CheckpointError(
            f"{path} should have {_SINGLE} or {_INDEX} and has {found}. "
            f"Save the model with save_pretrained(..., safe_serialization=True)."
        )
    return HuggingFaceFolder(path=path, config=config, tensors=tensors)


def read_huggingface_config(path: Path) -> dict[str, Any]:
    """The settings in a `config.json`, of a model that is not quantized.

    Raises:
      CheckpointError: the file is missing, no JSON object, or of a quantized model.
    """
    config = read_json(path)
    if "quantization_config" in config:
        raise CheckpointError(
            f"{path.parent} is already quantized (config.json has quantization_config). Start from "
            f"the unquantized model."
        )
    return config


def fetch_huggingface(hub_id: str, wanted: Sequence[str] = _WANTED) -> Path:
    """The local copy of hub model `hub_id` ("org/name"), downloaded if need be; weights as
    safetensors only. `wanted` are the names of files to fetch, or patterns.

    Raises:
      ImportError: the extra `hub` is not installed.
      CheckpointError: the hub does not have it, or cannot be reached.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ImportError(
            f"{hub_id!r} is no local path, and reading from the hub needs huggingface_hub: pip "
            f"install 'jaxquant[hub]'."
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(wanted)))
    # Errors of the hub are HTTP errors, which are OSErrors, or say that the id is malformed.
    except (OSError, huggingface_hub.errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id!r} is no local path and could not be had from the hub ({reason}). "
            f"Check the name, the network and your access."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`.

    Raises:
      CheckpointError: no such file, no JSON, or no object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Fetch the folder again.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Fetch the folder again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}, and an object was wanted. Fetch the folder "
            f"again."
        )
    return value


def _sharded_tensors(path: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / _INDEX} has no weight_map. Fetch the folder again.")
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors = {}
    for name, file in weight_map.items():
        # The hub's own folders hold links to elsewhere, so what counts is the name and not where
        # it leads.
        if (
            not isinstance(file, str)
            or file in ("", ".", "..")
            or "\\" in file
            or PurePosixPath(file).name != file
        ):
            raise CheckpointError(
                f"{path / _INDEX} puts {name!r} in {file!r}; a file beside the index was wanted. "
                f"Do not trust this folder."
            )
        if file not in shards:
            shards[file] = _file_tensors(path / file)
        if name not in shards[file]:
            raise CheckpointError(
                f"{path / _INDEX} puts {name!r} in {file}, which lacks it. Fetch the folder again."
            )
        tensors[name] = shards[file][name]
    return tensors


def _file_tensors(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing. Fetch the folder again.")
    # safetensors checks its header against the file's size before anything else.
    with _open(file) as opened:
        tensors = {}
        for name in opened.keys():  # noqa: SIM118 (the handle is no mapping)
            view = opened.get_slice(name)
            tensors[name] = StoredTensor(
                file=file, shape=tuple(view.get_shape()), type=view.get_dtype()
            )
    return tensors


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a sound safetensors file ({error}). Fetch it again."
        ) from None


def _read_tensor(stored: StoredTensor, name: str) -> np.ndarray:
    with _open(stored.file) as opened:
        return opened.get_tensor(name)
