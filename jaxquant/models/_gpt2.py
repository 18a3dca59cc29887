"""GPT-2 (Radford et al. 2019), a decoder with learned positions, in Flax Linen."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int32

from ..checkpoint import CheckpointError
from ._attention import attend_to_itself
from ._layer_norm import LayerNorm
from ._llama_weights import cast_dtype
from ._origins import lazy_tree, open_folder, Origin, Tensors
from ._settings import check_heads, Settings

DType = Any
# What activation `gelu_new` means: the tanh form.
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Sizes of a GPT-2."""

    vocab_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    max_length: int  # Tokens that there are positions for.
    norm_epsilon: float

    def __post_init__(self) -> None:
        check_heads(type(self).__name__, self.heads, self.width)


class GPT2Block(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    config: GPT2Config
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        config, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, length, width = x.shape
        normed = _norm(config, self.param_dtype, "attention_norm")(x)
        # One weight for all three, as the file has it: heads are cut out of the product.
        qkv = nn.Dense(3 * width, name="qkv", **kinds)(normed)
        q, k, v = (
            part.reshape(batch, length, config.heads, -1) for part in jnp.split(qkv, 3, axis=-1)
        )
        mixed = attend_to_itself(q, k, v).reshape(x.shape)
        x = x + nn.Dense(width, name="out", **kinds)(mixed)
        normed = _norm(config, self.param_dtype, "mlp_norm")(x)
        hidden = jax.nn.gelu(nn.Dense(config.hidden, name="up", **kinds)(normed), approximate=True)
        return x + nn.Dense(width, name="down", **kinds)(hidden)


class GPT2(nn.Module):
    """Tokens to next-token logits, which the embedding gives too (it is tied).

    Weights are held in `param_dtype`; all but norms, softmax and logits is computed in `dtype`.
    """

    config: GPT2Config
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int32[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
        """Logits (float32) of the token after each of `tokens`, given its row up to there."""
        config = self.config
        if tokens.shape[1] > config.max_length:
            raise ValueError(
                f"{tokens.shape[1]} tokens were given and the model has positions for "
                f"{config.max_length}. Cut them."
            )
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(config.vocab_size, config.width, name="embed", **kinds)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        x = embed(tokens) + nn.Embed(config.max_length, config.width, name="positions", **kinds)(
            positions
        )
        for layer in range(config.layers):
            x = GPT2Block(config, self.dtype, self.param_dtype, name=f"layers_{layer}")(x)
        x = _norm(config, self.param_dtype, "norm")(x)
        # As `nn.Embed.attend`, which would round the sums to `dtype`.
        embedding = embed.embedding.astype(self.dtype)
        return jax.lax.dot_general(
            x, embedding, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )


def _norm(config: GPT2Config, param_dtype: DType, name: str) -> LayerNorm:
    return LayerNorm(epsilon=config.norm_epsilon, param_dtype=param_dtype, name=name)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LoadedGPT2:
    """A GPT-2 on its way from a file; nothing large is in memory yet."""

    model: GPT2
    variables: Any  # Each leaf a `LazyArray`: see `checkpoint.materialize`.
    config: GPT2Config
    source: str


def load_gpt2(
    folder: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> LoadedGPT2:
    """The GPT-2 in a Hugging Face folder: safetensors, or else `pytorch_model.bin`, of which
    nothing is executed.

    Raises:
      FileNotFoundError: there is no such folder.
      CheckpointError: a file is missing or damaged, or the model is of another architecture.
    """
    values, file = open_folder(folder)
    config = _config(Settings(values, f"{folder}/config.json"), file)
    model = GPT2(config, dtype, cast_dtype(param_dtype))
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    prefix = "transformer." if "transformer.wte.weight" in file.tensors else ""

    def unused(name: str) -> bool:
        # The tied head may be stored as well, and old files hold each layer's causal mask.
        return name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias"))

    variables = lazy_tree(
        shapes, gpt2_origins(config, prefix), file, where=str(folder), unused=unused
    )
    return LoadedGPT2(model=model, variables=variables, config=config, source=file.describe())


def gpt2_origins(config: GPT2Config, prefix: str = "") -> dict[tuple[str, ...], Origin]:
    """For each variable of `GPT2(config)`, its tensor in a Hugging Face folder, whose matrices are
    [in, out] as ours.
    """
    origins: dict[tuple[str, ...], Origin] = {
        ("params", "embed", "embedding"): Origin(name=f"{prefix}wte.weight"),
        ("params", "positions", "embedding"): Origin(name=f"{prefix}wpe.weight"),
        ("params", "norm", "scale"): Origin(name=f"{prefix}ln_f.weight"),
        ("params", "norm", "bias"): Origin(name=f"{prefix}ln_f.bias"),
    }
    matrices = {"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    norms = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
    for layer in range(config.layers):
        for weight, parts in (("kernel", matrices), ("scale", norms)):
            for ours, theirs in parts.items():
                path, name = ("params", f"layers_{layer}", ours), f"{prefix}h.{layer}.{theirs}"
                origins[*path, weight] = Origin(name=f"{name}.weight")
                origins[*path, "bias"] = Origin(name=f"{name}.bias")
    return origins


def _config(settings: Settings, file: Tensors) -> GPT2Config:
    name = settings.get("model_type", str)
    if name != "gpt2":
        raise CheckpointError(
            f"{settings.where} is of a model of type {name!r}, and 'gpt2' was wanted."
        )
    settings.require("activation_function", *_TANH_GELU)
    settings.require("scale_attn_weights", True)
    settings.require("scale_attn_by_inverse_layer_idx", False)
    settings.require("add_cross_attention", False)
    settings.require("tie_word_embeddings", True)
    width = settings.get("n_embd", int)
    return settings.build(
        GPT2Config,
        vocab_size=settings.get("vocab_size", int),
        width=width,
        hidden=settings.get("n_inner", int, 4 * width),
        layers=settings.layers(file.tensors, "n_layer"),
        heads=settings.get("n_head", int),
        max_length=settings.get("n_positions", int),
        norm_epsilon=settings.get("layer_norm_epsilon", float),
    )
