"""What a model is, without its numbers: from any file that says so, a bare `config.json` too."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ..checkpoint import (
    CheckpointError,
    fetch_huggingface,
    open_gguf,
    open_huggingface,
    read_huggingface_config,
    read_manifest,
)
from ..checkpoint._manifest import plan_of
from ..intercept import Plan
from ._foreign_config import config_from_gguf, config_from_huggingface, config_from_json
from ._llama_config import LlamaConfig
from ._open import config_of, is_checkpoint

_CONFIG = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
    """Sizes and choices of a model; no tensor of it was read.

    `plan` is what it was quantized by, `None` for a float model. `param_dtype` is what the
    parameters that are no QArrays are held in; for a float model, what suits a chip.
    """

    config: LlamaConfig
    plan: Plan | None
    param_dtype: Any
    source: str


def read_outline(path: str | Path) -> Outline:
    """The outline of the model at `path`.

    `path` is a Hugging Face folder, its `config.json` or a folder with nothing but that, a hub id
    (of which `config.json` alone is fetched), a `.gguf` file, or a folder that jaxquant wrote.
    Where weights lie beside, the config is held against them.

    **Raises:** `FileNotFoundError`; `CheckpointError` for what is damaged or of an unknown
    architecture; `ImportError` for a hub id without huggingface_hub.
    """
    text, local = str(path), Path(path).expanduser()
    if not local.exists():
        if local.suffix or text.count("/") != 1 or text.startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"There is nothing at {text}. Give a config.json, a Hugging Face folder or hub id "
                "(org/name), a .gguf file, or a folder that jaxquant wrote."
            )
        return _from_json(fetch_huggingface(text, (_CONFIG,)) / _CONFIG)
    if is_checkpoint(local):
        manifest = read_manifest(local)
        return Outline(
            config=config_of(manifest, local),
            plan=plan_of(manifest, str(local)),
            # As `open_model` reads such a folder.
            param_dtype=jnp.float32,
            source=str(manifest.metadata.get("source", "unknown")),
        )
    if local.is_file():
        if local.suffix == ".json":
            return _from_json(local)
        file = open_gguf(local)
        return _float(config_from_gguf(file), file.describe())
    if any(local.glob("*.safetensors*")):
        folder = open_huggingface(local)
        return _float(config_from_huggingface(folder), folder.describe())
    if not (local / _CONFIG).is_file():
        raise CheckpointError(
            f"{local} has no {_CONFIG}, and jaxquant did not write it. Give a folder with a "
            "config.json, with weights or without."
        )
    return _from_json(local / _CONFIG)


def _from_json(path: Path) -> Outline:
    config = config_from_json(read_huggingface_config(path), str(path))
    return _float(config, f"shapes of {path}")


def _float(config: LlamaConfig, source: str) -> Outline:
    return Outline(config=config, plan=None, param_dtype=jnp.bfloat16, source=source)
