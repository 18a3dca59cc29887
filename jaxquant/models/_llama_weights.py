"""Where each parameter of a `Llama` lies in a foreign file, and what must be done to it on the way.

GGUF files of architecture `llama` hold the rows of q and k in another order: llama.cpp turns
neighbouring pairs `(2i, 2i + 1)`, Hugging Face pairs `(i, i + head_dim / 2)`, and its converter
permutes the rows to match. `qwen2` files are not permuted.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..checkpoint import CheckpointError, LazyArray
from ._llama import Llama
from ._llama_config import LlamaConfig

# An `nnx.State`. Its own annotations are deprecated spellings, at which beartype warns.
State = Any
Path = tuple[Any, ...]  # ("layers", 3, "mlp", "up", "kernel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The foreign tensor that one parameter comes from."""

    name: str
    transposed: bool = False  # Stored [out, in]; ours are [in, out].
    interleaved_heads: int | None = (
        None  # Rows of so many heads are in llama.cpp's order. `None`: in ours.
    )


@runtime_checkable
class _Tensors(Protocol):
    """An opened file: `GGUFFile` or `HuggingFaceFolder`."""

    @property
    def tensors(self) -> Collection[str]: ...

    def lazy(self, name: str) -> LazyArray: ...


def gguf_origins(config: LlamaConfig, *, interleaved: bool) -> dict[Path, Origin]:
    """For each parameter path of `Llama(config)`, its tensor in a GGUF file."""
    origins: dict[Path, Origin] = {
        ("embed", "embedding"): Origin(name="token_embd.weight"),
        ("norm", "scale"): Origin(name="output_norm.weight"),
    }
    if not config.tied:
        origins["head", "kernel"] = Origin(name="output.weight", transposed=True)
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
                name=f"{at}.{theirs}.weight", transposed=True, interleaved_heads=order
            )
            if config.qkv_bias and ours != "o":
                origins[*path, "bias"] = Origin(name=f"{at}.{theirs}.bias", interleaved_heads=order)
        for part in ("gate", "up", "down"):
            origins["layers", layer, "mlp", part, "kernel"] = Origin(
                name=f"{at}.ffn_{part}.weight", transposed=True
            )
    return origins


def huggingface_origins(config: LlamaConfig) -> dict[Path, Origin]:
    """For each parameter path of `Llama(config)`, its tensor in a Hugging Face folder."""
    origins: dict[Path, Origin] = {
        ("embed", "embedding"): Origin(name="model.embed_tokens.weight"),
        ("norm", "scale"): Origin(name="model.norm.weight"),
    }
    if not config.tied:
        origins["head", "kernel"] = Origin(name="lm_head.weight", transposed=True)
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
                name=f"{at}.self_attn.{part}_proj.weight", transposed=True
            )
            if config.qkv_bias and part != "o":
                origins[*path, "bias"] = Origin(name=f"{at}.self_attn.{part}_proj.bias")
        for part in ("gate", "up", "down"):
            name = f"{at}.mlp.{part}_proj.weight"
            origins["layers", layer, "mlp", part, "kernel"] = Origin(name=name, transposed=True)
    return origins


def lazy_variables(
    model: Llama,
    origins: dict[Path, Origin],
    file: _Tensors,
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
    known = {origin.name for origin in origins.values()}
    strange = sorted(name for name in file.tensors if name not in known and not unused(name))
    if strange:
        shown = ", ".join(map(repr, strange[:3]))
        raise CheckpointError(
            f"{where} holds {len(strange)} tensors that this architecture does not have ({shown}). "
            f"It would give wrong numbers without them: use a model of a supported architecture."
        )
    leaves = {}
    for path, variable in flat.items():
        leaf = variable.get_value()
        leaves[path] = variable.replace(
            _lazy_leaf(file.lazy(origins[path].name), origins[path], leaf, where)
        )
    return nnx.from_flat_state(leaves)


def _lazy_leaf(stored: LazyArray, origin: Origin, leaf: Any, where: str) -> LazyArray:
    wanted = tuple(reversed(leaf.shape)) if origin.transposed else tuple(leaf.shape)
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
        return np.ascontiguousarray(array.T if origin.transposed else array, dtype=dtype)

    return LazyArray(shape=tuple(leaf.shape), dtype=dtype, load=load, name=origin.name)


def _deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows `(pair, member)` of each head, as llama.cpp has them, in the order `(member, pair)`."""
    split = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


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
