"""BERT, the encoder (Devlin et al. 2019, arXiv:1810.04805), in Flax Linen, and the sentence
embeddings that are made with it (Reimers and Gurevych 2019, arXiv:1908.10084).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int32

from ..checkpoint import CheckpointError, Tokenizer, tokenizer_from_huggingface
from ._layer_norm import LayerNorm
from ._llama_weights import cast_dtype
from ._origins import lazy_tree, open_folder, Origin, Tensors, TRANSPOSED
from ._settings import check_heads, Settings

DType = Any
_MASKED = -1e30  # Far below any score, and no infinity, of which a row of nothing else makes NaN.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of a BERT encoder."""

    vocab_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    max_length: int  # Tokens that there are positions for.
    token_types: int
    norm_epsilon: float

    def __post_init__(self) -> None:
        check_heads(type(self).__name__, self.heads, self.width)


class BertLayer(nn.Module):
    """Attention and MLP, each added to the stream, which is normed after it."""

    config: BertConfig
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        config, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, length, width = x.shape
        heads = (batch, length, config.heads, width // config.heads)
        q, k, v = (
            nn.Dense(width, name=name, **kinds)(x).reshape(heads).transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None, :], scores * heads[-1] ** -0.5, _MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, v).transpose(0, 2, 1, 3)
        attended = nn.Dense(width, name="out", **kinds)(mixed.reshape(x.shape))
        x = _norm(config, self.param_dtype, "attention_norm")(x + attended)
        hidden = jax.nn.gelu(nn.Dense(config.hidden, name="up", **kinds)(x), approximate=False)
        down = nn.Dense(width, name="down", **kinds)(hidden)
        return _norm(config, self.param_dtype, "mlp_norm")(x + down)


class Bert(nn.Module):
    """Tokens to features, or to one embedding a row.

    Weights are held in `param_dtype`; all but norms, softmax and the mean of `embed` is computed in
    `dtype`. There is no pooler and no head: the sentence embeddings use neither.
    """

    config: BertConfig
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int32[Array, "batch length"],
        mask: Bool[Array, "batch length"],
        token_types: Int32[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """The last layer's features. `mask` is true where `tokens` are none of the padding."""
        config = self.config
        if tokens.shape[1] > config.max_length:
            raise ValueError(
                f"{tokens.shape[1]} tokens were given and the model has positions for "
                f"{config.max_length}. Cut the text."
            )
        if token_types is None:
            token_types = jnp.zeros_like(tokens)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        tables = {
            "embed": (config.vocab_size, tokens),
            "positions": (config.max_length, positions),
            "token_types": (config.token_types, token_types),
        }
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        words, places, types = (
            nn.Embed(size, config.width, name=name, **kinds)(ids)
            for name, (size, ids) in tables.items()
        )
        x = words + types + places
        x = _norm(config, self.param_dtype, "embed_norm")(x)
        for layer in range(config.layers):
            x = BertLayer(config, self.dtype, self.param_dtype, name=f"layers_{layer}")(x, mask)
        return x

    def embed_sentences(
        self, tokens: Int32[Array, "batch length"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch width"]:
        """The mean of each row's features, padding left out, at length 1; in float32."""
        features = self(tokens, mask).astype(jnp.float32)
        weights = mask.astype(jnp.float32)[..., None]
        mean = jnp.sum(features * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1e-9)
        length = jnp.linalg.norm(mean, axis=-1, keepdims=True)
        return mean / jnp.maximum(length, 1e-12)


def _norm(config: BertConfig, param_dtype: DType, name: str) -> LayerNorm:
    return LayerNorm(epsilon=config.norm_epsilon, param_dtype=param_dtype, name=name)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LoadedBert:
    """A BERT on its way from a file; nothing large is in memory yet."""

    model: Bert
    variables: Any  # Each leaf a `LazyArray`: see `checkpoint.materialize`.
    config: BertConfig
    tokenizer: Tokenizer
    source: str

    def tokenize(self, texts: Sequence[str], length: int) -> tuple[Array, Array]:
        """int32 tokens and bool mask `[texts, length]`: [CLS], the text (cut), [SEP], padding."""
        inner = self.tokenizer.inner
        # The file's own length and padding are of no use here, and its object is ours to keep.
        inner.no_truncation()
        inner.no_padding()
        if length < 2:
            raise ValueError(f"length is {length}; [CLS] and [SEP] need 2.")
        tokens = np.zeros((len(texts), length), np.int32)
        mask = np.zeros((len(texts), length), bool)
        for row, encoded in enumerate(inner.encode_batch(list(texts))):
            ids = encoded.ids
            ids = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return jnp.asarray(tokens), jnp.asarray(mask)


def load_bert(
    folder: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> LoadedBert:
    """The BERT in a Hugging Face folder, such as those of sentence-transformers.

    ```python
    loaded = load_bert(find_minilm())
    variables = materialize(loaded.variables)
    tokens, mask = loaded.tokenize(["One sentence.", "Another."], 128)
    embeddings = loaded.model.apply(variables, tokens, mask, method="embed_sentences")
    ```

    Raises:
      FileNotFoundError: there is no such folder.
      CheckpointError: a file is missing or damaged, or the model is of another architecture.
    """
    values, file = open_folder(folder)
    settings = Settings(values, f"{folder}/config.json")
    config = _config(settings, file)
    model = Bert(config, dtype, cast_dtype(param_dtype))
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids, mask)
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in file.tensors else ""

    def unused(name: str) -> bool:
        # Heads and pooler, which serve other ends; position_ids is 0, 1, 2, ...
        return name.startswith(("cls.", f"{prefix}pooler.")) or name.endswith(".position_ids")

    variables = lazy_tree(
        shapes, bert_origins(config, prefix), file, where=str(folder), unused=unused
    )
    return LoadedBert(
        model=model,
        variables=variables,
        config=config,
        tokenizer=tokenizer_from_huggingface(folder),
        source=file.describe(),
    )


def bert_origins(config: BertConfig, prefix: str = "") -> dict[tuple[str, ...], Origin]:
    """For each variable of `Bert(config)`, its tensor in a Hugging Face folder."""
    origins: dict[tuple[str, ...], Origin] = {}

    def norm(path: tuple[str, ...], name: str) -> None:
        origins["params", *path, "scale"] = Origin(name=f"{name}.weight")
        origins["params", *path, "bias"] = Origin(name=f"{name}.bias")

    tables = {
        "embed": "word_embeddings",
        "positions": "position_embeddings",
        "token_types": "token_type_embeddings",
    }
    for ours, theirs in tables.items():
        origins["params", ours, "embedding"] = Origin(name=f"{prefix}embeddings.{theirs}.weight")
    norm(("embed_norm",), f"{prefix}embeddings.LayerNorm")
    matrices = {
        **{part: f"attention.self.{part}" for part in ("query", "key", "value")},
        "out": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    }
    for layer in range(config.layers):
        at, theirs = f"layers_{layer}", f"{prefix}encoder.layer.{layer}"
        for ours, name in matrices.items():
            origins["params", at, ours, "kernel"] = Origin(
                name=f"{theirs}.{name}.weight", axes=TRANSPOSED
            )
            origins["params", at, ours, "bias"] = Origin(name=f"{theirs}.{name}.bias")
        norm((at, "attention_norm"), f"{theirs}.attention.output.LayerNorm")
        norm((at, "mlp_norm"), f"{theirs}.output.LayerNorm")
    return origins


def _config(settings: Settings, file: Tensors) -> BertConfig:
    name = settings.get("model_type", str)
    if name != "bert":
        raise CheckpointError(
            f"{settings.where} is of a model of type {name!r}, and 'bert' was wanted."
        )
    settings.require("hidden_act", "gelu")
    settings.require("position_embedding_type", "absolute")
    settings.require("is_decoder", False)
    return settings.build(
        BertConfig,
        vocab_size=settings.get("vocab_size", int),
        width=settings.get("hidden_size", int),
        hidden=settings.get("intermediate_size", int),
        layers=settings.layers(file.tensors, "num_hidden_layers"),
        heads=settings.get("num_attention_heads", int),
        max_length=settings.get("max_position_embeddings", int),
        token_types=settings.get("type_vocab_size", int),
        norm_epsilon=settings.get("layer_norm_eps", float),
    )
