"""A model from a path: what it is, its parameters (unread), its tokenizer."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ..checkpoint import (
    fetch_huggingface,
    GGUFFile,
    HuggingFaceFolder,
    materialize,
    open_gguf,
    open_huggingface,
    Tokenizer,
    tokenizer_from_gguf,
    tokenizer_from_huggingface,
)
from ._foreign_config import config_from_gguf, config_from_huggingface, GGUF_ARCHITECTURES
from ._llama import Llama
from ._llama_config import LlamaConfig
from ._llama_weights import cast_dtype, gguf_origins, huggingface_origins, lazy_variables, State


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A model on its way from a file; nothing large is in memory yet."""

    model: Llama  # Abstract: shapes in place of numbers.
    variables: State  # The state of `model`, each value a `LazyArray`.
    config: LlamaConfig
    source: str  # What the numbers are: "dequantized Q4_1/Q8_0 GGUF".
    path: Path
    read_tokenizer: Callable[[], Tokenizer]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read at the first use.

        Raises:
          CheckpointError: the file has none, or one that we cannot read. (Weights can be used
            without.)
        """
        return self.read_tokenizer()

    def bind(self) -> Llama:
        """The model with its numbers in memory, read leaf by leaf."""
        return bind(self.model, self.variables)


def load_model(
    path: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> LoadedModel:
    """The model in a `.gguf` file, in a Hugging Face folder, or on the hub ("org/name", when there
    is no such path).

    Args:
      dtype: what the model computes in.
      param_dtype: what its parameters are held in; they are cast as they are read.

    Raises:
      FileNotFoundError: there is nothing at `path` and it is no hub id.
      CheckpointError: what is there is damaged, incomplete, or of an unknown architecture.
      ImportError: it is a hub id and huggingface_hub is not installed.
    """
    text = str(path)
    local = Path(path).expanduser()
    param_dtype = cast_dtype(param_dtype)
    if not local.exists():
        if local.suffix == ".gguf" or text.count("/") != 1 or text.startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"There is nothing at {text}. Give a .gguf file, a Hugging Face folder, or a hub "
                f"id such as org/name."
            )
        local = fetch_huggingface(text)
    if local.is_file():
        return _from_gguf(open_gguf(local), dtype, param_dtype)
    return _from_huggingface(open_huggingface(local), dtype, param_dtype)


def bind(model: Llama, variables: State) -> Llama:
    """`model` with the numbers of `variables`, which are read one leaf after the other; `model`
    itself may be abstract.
    """
    return nnx.merge(nnx.graphdef(model), materialize(variables))


def _from_gguf(file: GGUFFile, dtype: Any, param_dtype: Any) -> LoadedModel:
    config = config_from_gguf(file)
    model = Llama.abstract(config, dtype=dtype, param_dtype=param_dtype)
    interleaved = GGUF_ARCHITECTURES[file.metadata["general.architecture"]].interleaved
    variables = lazy_variables(
        model,
        gguf_origins(config, interleaved=interleaved),
        file,
        where=str(file.path),
        unused=lambda name: name == "rope_freqs.weight",  # In the config already.
    )
    return LoadedModel(
        model=model,
        variables=variables,
        config=config,
        source=file.describe(),
        path=file.path,
        read_tokenizer=functools.partial(tokenizer_from_gguf, file.metadata),
    )


def _from_huggingface(folder: HuggingFaceFolder, dtype: Any, param_dtype: Any) -> LoadedModel:
    config = config_from_huggingface(folder)
    model = Llama.abstract(config, dtype=dtype, param_dtype=param_dtype)

    def unused(name: str) -> bool:
        # Old files store the rotation's frequencies, and some store a tied head as well.
        return name.endswith(".rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")

    variables = lazy_variables(
        model, huggingface_origins(config), folder, where=str(folder.path), unused=unused
    )
    return LoadedModel(
        model=model,
        variables=variables,
        config=config,
        source=folder.describe(),
        path=folder.path,
        read_tokenizer=functools.partial(tokenizer_from_huggingface, folder.path),
    )
