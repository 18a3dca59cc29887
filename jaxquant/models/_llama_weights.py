"""Where each parameter of a `Llama` lies in a foreign file, and what must be done to it on the way.

GGUF files of architecture `llama` hold the rows of q and k in another order: llama.cpp turns
neighbouring pairs `(2i, 2i + 1)`, Hugging Face pairs `(i, i + head_dim / 2)`, and its converter
permutes the rows to match. `qwen2` files are not permuted.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ._llama import Llama
from ._llama_config import LlamaConfig
from ._origins import lazy_leaf, Origin, refuse_strange, Tensors, TRANSPOSED

# An `nnx.State`. Its own annotations are deprecated spellings, at which beartype warns.
State = Any
Path = tuple[Any, ...]  # ("layers", 3, "mlp", "up", "kernel")


def gguf_origins(config: LlamaConfig, *, interleaved: bool) -> dict[Path, Origin]:
    """For each parameter path of `Llama(config)`, its tensor in a GGUF file."""
    origins: dict[Path, Origin] = {
        ("embed", "embedding"): Origin(name="token_embd.weight"),
        ("norm", "scale"): Origin(name="output_norm.weight"),
    }
    if not config.tied:
        origins["head", "kernel"] = Origin(name="output.weight", axes=TRANSPOSED)
    heads = {"q": config.heads, "k": config.kv_heads} if interleaved else {}
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    for layer in range(config.layers):
        at = f"blk.{layer}"
        origins["layers", layer, "attention_norm", "scale"] = Origin(name=f"{at}.attn_norm.weight")
        origins["layers", layer, "mlp_norm", "scale"] = Origin(name=f"{at}.ffn_norm.weight")
        for ours, theirs in names.items():
            order = heads.get(ours)
            path: Path = ("layers", layer, "attention", ours)
            origins[*path, "kernel"] = Origin(
                name=f"{at}.{theirs}.weight", axes=TRANSPOSED, interleaved_heads=order
            )
            if config.qkv_bias and ours != "o":
                origins[*path, "bias"] = Origin(name=f"{at}.{theirs}.bias", interleaved_heads=order)
        for part in ("gate", "up", "down"):
            origins["layers", layer, "mlp", part, "kernel"] = Origin(
                name=f"{at}.ffn_{part}.weight", axes=TRANSPOSED
            )
    return origins


def huggingface_origins(config: LlamaConfig) -> dict[Path, Origin]:
    """For each parameter path of `Llama(config)`, its tensor in a Hugging Face folder."""
    origins: dict[Path, Origin] = {
        ("embed", "embedding"): Origin(name="model.embed_tokens.weight"),
        ("norm", "scale"): Origin(name="model.norm.weight"),
    }
    if not config.tied:
        origins["head", "kernel"] = Origin(name="lm_head.weight", axes=TRANSPOSED)
    for layer in range(config.layers):
        at = f"model.layers.{layer}"
        origins["layers", layer, "attention_norm", "scale"] = Origin(
            name=f"{at}.input_layernorm.weight"
        )
        origins["layers", layer, "mlp_norm", "scale"] = Origin(
            name=f"{at}.post_attention_layernorm.weight"
        )
        for part in "qkvo":
            path: Path = ("layers", layer, "attention", part)
            origins[*path, "kernel"] = Origin(
                name=f"{at}.self_attn.{part}_proj.weight", axes=TRANSPOSED
            )
            if config.qkv_bias and part != "o":
                origins[*path, "bias"] = Origin(name=f"{at}.self_attn.{part}_proj.bias")
        for part in ("gate", "up", "down"):
            name = f"{at}.mlp.{part}_proj.weight"
            origins["layers", layer, "mlp", part, "kernel"] = Origin(name=name, axes=TRANSPOSED)
    return origins


def lazy_variables(
    model: Llama,
    origins: dict[Path, Origin],
    file: Tensors,
    *,
    where: str,
    unused: Callable[[str], bool],
) -> State:
    """The state of the abstract `model` with a `LazyArray` for each parameter.

    Args:
      origins: where each parameter lies in `file`.
      where: what messages call the file.
      unused: whether a tensor of the file that no parameter wants may be left out.

    Raises:
      CheckpointError: a tensor is missing, has another shape than the config implies, or is one we
        do not know.
    """
    state = nnx.state(model)
    flat = dict(nnx.to_flat_state(state))
    if flat.keys() != origins.keys():
        raise AssertionError(
            f"The weight map and the model disagree on {flat.keys() ^ origins.keys()}."
        )
    refuse_strange(origins.values(), file, where=where, unused=unused)
    leaves = {}
    for path, variable in flat.items():
        leaf = variable.get_value()
        leaves[path] = variable.replace(
            lazy_leaf(file.lazy(origins[path].name), origins[path], leaf, where)
        )
    return nnx.from_flat_state(leaves)


def cast_dtype(name: Any) -> np.dtype[Any]:
    """The dtype to hold parameters in, checked to be a float.

    Raises:
      ValueError: it is not a floating-point dtype.
    """
    dtype = jnp.dtype(name)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"param_dtype is {dtype}; a floating-point dtype was wanted. Use jnp.float32 or "
            f"jnp.bfloat16."
        )
    return dtype
