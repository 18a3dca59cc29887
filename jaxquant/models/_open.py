"""Any model that a path names: float from foreign files, quantized from a folder of ours."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ..checkpoint import (
    CheckpointError,
    load,
    Manifest,
    open_gguf,
    open_huggingface,
    read_files,
    read_manifest,
    save,
    Tokenizer,
)
from ..checkpoint._manifest import NAME as MANIFEST
from ..intercept import Account, Plan, prepare, wrap
from ._inventory import checkpoint_inventory, gguf_inventory, huggingface_inventory, Inventory
from ._llama import Llama
from ._llama_config import LlamaConfig
from ._load import bind, load_model

_FAMILY = "llama"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OpenedModel:
    """A model that was found and checked.

    `model` is abstract (shapes in place of numbers). The leaves of `variables` are `LazyArray`s for
    a foreign file, arrays and QArrays for a folder of ours. `plan` is `None` for a float model.
    `source` says what the numbers are: "dequantized Q4_1/Q8_0 GGUF".
    """

    model: Llama
    variables: nnx.State
    plan: Plan | None
    config: LlamaConfig
    source: str
    path: Path
    read_tokenizer: Callable[[], Tokenizer]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read at the first use.

        **Raises:** `CheckpointError` if there is none, or one that cannot be read.
        """
        return self.read_tokenizer()

    def ready(self) -> Any:
        """The model with its numbers in memory, to be called: tokens to logits.

        A float model is a `Llama`; a quantized one is wrapped, its weights laid out as the platform
        reads them fast.
        """
        if self.plan is None:
            return bind(self.model, self.variables)
        return wrap(self.model, self.plan, prepare(self.variables, self.plan))


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder with a manifest of ours in it, sound or not."""
    return (path / MANIFEST).is_file()


def open_model(path: str | Path, *, dtype: Any = jnp.float32) -> OpenedModel:
    """The model in a `.gguf` file, a Hugging Face folder or hub id, or a folder of ours.

    `dtype` is what it computes in. Foreign weights stay in their files until they are used.

    **Raises:** `FileNotFoundError`; `CheckpointError` for what is damaged, incomplete or of an
    unknown architecture; `ImportError` for a hub id without huggingface_hub.

    ```python
    opened = open_model("model.gguf")
    logits = opened.ready()(tokens)
    ```
    """
    local = Path(path).expanduser()
    if is_checkpoint(local):
        return _from_checkpoint(local, dtype)
    loaded = load_model(path, dtype=dtype)
    return OpenedModel(
        model=loaded.model,
        variables=loaded.variables,
        plan=None,
        config=loaded.config,
        source=loaded.source,
        path=loaded.path,
        read_tokenizer=loaded.read_tokenizer,
    )


def read_inventory(path: str | Path) -> tuple[Inventory, str]:
    """Every tensor of the model at `path` as its files store it, and what the numbers are.

    A folder of ours may hold any model; foreign files are those that `open_model` takes.

    **Raises:** as `open_model`.
    """
    local = Path(path).expanduser()
    if is_checkpoint(local):
        manifest = read_manifest(local)
        source = str(manifest.metadata.get("source", "unknown source"))
        said = f"{source}, quantized by {manifest.plan['recipe']}"
        return checkpoint_inventory(local), said
    loaded = load_model(path)
    if loaded.path.is_dir():
        return huggingface_inventory(open_huggingface(loaded.path)), loaded.source
    return gguf_inventory(open_gguf(loaded.path)), loaded.source


def save_model(
    path: str | Path,
    opened: OpenedModel,
    qvariables: nnx.State,
    plan: Plan,
    *,
    account: Account | None = None,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Writes a quantized model to the folder `path`, with what `open_model` needs to read it again.

    The tokenizer goes along if the model has one that can be read, and the errors of `account`.

    **Raises:** `CheckpointError` if it cannot be written.
    """
    metadata = {
        "family": _FAMILY,
        "config": dataclasses.asdict(opened.config),
        "source": opened.source,
        "name": opened.path.name,
    }
    return save(
        path,
        qvariables,
        plan,
        account=account,
        extra_files=_tokenizer_files(opened),
        metadata=metadata,
        progress=progress,
    )


def _tokenizer_files(opened: OpenedModel) -> dict[str, bytes]:
    try:
        tokenizer = opened.tokenizer
    except CheckpointError:
        # Weights serve without: with ids from elsewhere. Who asks for the tokenizer is told.
        return {}
    with tempfile.TemporaryDirectory() as folder:
        file = tokenizer.save(folder)
        return {file.name: file.read_bytes()}


def _from_checkpoint(path: Path, dtype: Any) -> OpenedModel:
    manifest = read_manifest(path)
    config = config_of(manifest, path)
    model = Llama.abstract(config, dtype=dtype)
    variables, plan = load(path, template=nnx.state(model))
    return OpenedModel(
        model=model,
        variables=variables,
        plan=plan,
        config=config,
        source=str(manifest.metadata.get("source", "unknown")),
        path=path,
        read_tokenizer=functools.partial(_read_tokenizer, path, manifest),
    )


def config_of(manifest: Manifest, path: Path) -> LlamaConfig:
    """The config that a folder of ours keeps.

    **Raises:** `CheckpointError` if it is none of a Llama-family model.
    """
    family = manifest.metadata.get("family")
    if family != _FAMILY:
        raise CheckpointError(
            f"{path} does not say that it holds a model of the {_FAMILY} family (its metadata has "
            f"family {family!r}). Load it with jaxquant.load, and wrap the model it belongs to."
        )
    try:
        fields = dict(manifest.metadata["config"])
        if fields.get("rope_factors") is not None:
            fields["rope_factors"] = tuple(fields["rope_factors"])
        return LlamaConfig(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / MANIFEST} does not describe its model: {error}. Quantize the model again."
        ) from None


def _read_tokenizer(path: Path, manifest: Manifest) -> Tokenizer:
    files = read_files(path)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return Tokenizer.load(folder)
