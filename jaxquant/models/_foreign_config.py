"""A `LlamaConfig` from what a foreign file says; whatever the model here does not compute is
refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..checkpoint import CheckpointError, GGUFFile, HuggingFaceFolder
from ._llama_config import llama3_factors, LlamaConfig
from ._settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What sets one member of the family apart."""

    qkv_bias: bool
    interleaved: bool = False  # In GGUF, q and k rows are in llama.cpp's order.


GGUF_ARCHITECTURES = {
    "llama": Architecture(qkv_bias=False, interleaved=True),
    "qwen2": Architecture(qkv_bias=True),
}
HUGGINGFACE_ARCHITECTURES = {
    "llama": Architecture(qkv_bias=False),
    "qwen2": Architecture(qkv_bias=True),
}

# No model has more layers, or wider heads: what is made in proportion to them ends.
_MOST = 1 << 14


def config_from_gguf(file: GGUFFile) -> LlamaConfig:
    """The config of the model in a GGUF file.

    Raises:
      CheckpointError: the architecture is unknown, a key is missing or of the wrong kind, or the
        model has parts that are not implemented here.
    """
    settings = Settings(file.metadata, str(file.path))
    name = settings.get("general.architecture", str)
    if name not in GGUF_ARCHITECTURES:
        raise _unknown_architecture(str(file.path), name, GGUF_ARCHITECTURES)
    if settings.get(f"{name}.expert_count", int, 0):
        raise settings.refuse(f"{name}.expert_count", "a model without experts")
    for needed in ("token_embd.weight", "blk.0.ffn_gate.weight"):
        file.lazy(needed)  # Says which is missing.
    width = settings.get(f"{name}.embedding_length", int)
    heads = settings.get(f"{name}.attention.head_count", int)
    head_dim = settings.get(f"{name}.attention.key_length", int, width // max(heads, 1))
    theta = settings.get(f"{name}.rope.freq_base", float, 10000.0)
    if settings.get(f"{name}.rope.dimension_count", int, head_dim) != head_dim:
        raise settings.refuse(f"{name}.rope.dimension_count", f"{head_dim}, the head's size")
    if settings.get(f"{name}.attention.value_length", int, head_dim) != head_dim:
        raise settings.refuse(f"{name}.attention.value_length", f"{head_dim}, the key's size")
    _check_heads(settings, file, "blk.0.attn_q.weight", heads=heads, head_dim=head_dim)
    layers = settings.layers(file.tensors, f"{name}.block_count")
    factors = None
    scaling = settings.get(f"{name}.rope.scaling.type", str, "none")
    if scaling == "linear":
        factors = (settings.get(f"{name}.rope.scaling.factor", float),) * (head_dim // 2)
    elif scaling != "none":
        raise settings.refuse(f"{name}.rope.scaling.type", "'none' or 'linear'")
    if "rope_freqs.weight" in file.tensors:
        # Llama 3.1's scaling, worked out by the converter.
        factors = tuple(
            float(factor) for factor in file.lazy("rope_freqs.weight").read().reshape(-1)
        )
    return settings.build(
        LlamaConfig,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        width=width,
        hidden=settings.get(f"{name}.feed_forward_length", int),
        layers=layers,
        heads=heads,
        kv_heads=settings.get(f"{name}.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        rope_theta=theta,
        norm_epsilon=settings.get(f"{name}.attention.layer_norm_rms_epsilon", float),
        max_length=settings.get(f"{name}.context_length", int),
        tied="output.weight" not in file.tensors,
        qkv_bias=GGUF_ARCHITECTURES[name].qkv_bias,
        rope_factors=factors,
    )


def config_from_huggingface(folder: HuggingFaceFolder) -> LlamaConfig:
    """The config of the model in a Hugging Face folder, held against its tensors.

    Raises:
      CheckpointError: as `config_from_gguf`.
    """
    where = f"{folder.path}/config.json"
    config = config_from_json(folder.config, where)
    settings = Settings(folder.config, where)
    first_q = "model.layers.0.self_attn.q_proj.weight"
    _check_heads(settings, folder, first_q, heads=config.heads, head_dim=config.head_dim)
    settings.layers(folder.tensors, "num_hidden_layers")
    return config


def config_from_json(values: Mapping[str, Any], where: str) -> LlamaConfig:
    """The config that the settings of a Hugging Face `config.json` stand for.

    `where` is what errors call the file. Without tensors nothing shows that it is undamaged, so
    sizes are held to what a model may have.

    Raises:
      CheckpointError: as `config_from_gguf`.
    """
    settings = Settings(values, where)
    name = settings.get("model_type", str)
    if name not in HUGGINGFACE_ARCHITECTURES:
        raise _unknown_architecture(where, name, HUGGINGFACE_ARCHITECTURES)
    if settings.get("hidden_act", str, "silu") != "silu":
        raise settings.refuse("hidden_act", "'silu'")
    for flag in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if settings.get(flag, bool, False):
            raise settings.refuse(flag, "false")
    width = settings.get("hidden_size", int)
    heads = settings.get("num_attention_heads", int)
    head_dim = settings.get("head_dim", int, width // max(heads, 1))
    layers = settings.get("num_hidden_layers", int)
    for key, size in (("num_hidden_layers", layers), ("head_dim", head_dim)):
        if size > _MOST:
            raise settings.refuse(key, f"at most {_MOST}")
    theta, factors = _huggingface_rope(values, where, head_dim)
    return settings.build(
        LlamaConfig,
        vocab_size=settings.get("vocab_size", int),
        width=width,
        hidden=settings.get("intermediate_size", int),
        layers=layers,
        heads=heads,
        kv_heads=settings.get("num_key_value_heads", int, heads),
        head_dim=head_dim,
        rope_theta=theta,
        norm_epsilon=settings.get("rms_norm_eps", float, 1e-6),
        max_length=settings.get("max_position_embeddings", int, 2048),
        tied=settings.get("tie_word_embeddings", bool, False),
        qkv_bias=HUGGINGFACE_ARCHITECTURES[name].qkv_bias,
        rope_factors=factors,
    )


def _huggingface_rope(
    config: Mapping[str, Any], where: str, head_dim: int
) -> tuple[float, tuple[float, ...] | None]:
    # transformers 5 writes `rope_parameters` with the base in it; before, `rope_scaling` stood
    # beside `rope_theta`.
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(nested, Mapping):
        raise CheckpointError(
            f"{where}: the rope settings are {nested!r}, and an object was wanted. Fetch it again."
        )
    rope = Settings({"rope_theta": config.get("rope_theta"), **nested}, where)
    theta = rope.get("rope_theta", float, 10000.0)
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, (rope.get("factor", float),) * (head_dim // 2)
    if kind == "llama3":
        try:
            return theta, llama3_factors(
                head_dim=head_dim,
                theta=theta,
                factor=rope.get("factor", float),
                low=rope.get("low_freq_factor", float),
                high=rope.get("high_freq_factor", float),
                original_length=rope.get("original_max_position_embeddings", int),
            )
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None
    raise CheckpointError(
        f"{where}: rope scaling {kind!r} is not implemented; default, linear and llama3 are. Use "
        f"another model."
    )


def _check_heads(
    settings: Settings,
    file: GGUFFile | HuggingFaceFolder,
    first_q: str,
    *,
    heads: int,
    head_dim: int,
) -> None:
    """Compares the heads with a tensor, before anything is made in proportion to them."""
    rows = file.lazy(first_q).shape[0]
    if heads < 1 or heads * head_dim != rows:
        raise CheckpointError(
            f"{settings.where}: {heads} heads of {head_dim} are not the {rows} rows of {first_q}. "
            f"The file is damaged or its config is of another model: fetch it again."
        )


def _unknown_architecture(
    where: str, name: str, known: Mapping[str, Architecture]
) -> CheckpointError:
    return CheckpointError(
        f"{where} holds a model of architecture {name!r}; {', '.join(known)} can be read. Use a "
        f"model of one of these."
    )
