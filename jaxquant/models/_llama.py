"""A decoder of the Llama family, in Flax NNX.

Touvron et al. 2023 (Llama), Ainslie et al. 2023 (grouped queries), Su et al. 2021 (rotary
positions), in the form that Hugging Face files hold: rotary pairs are `(i, i + head_dim / 2)`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from ._attention import attend, attend_to_itself, rotate, rotation
from ._llama_config import LlamaConfig

DType = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys (rotated) and values of the tokens seen so far, one of each a layer.

    Rows from `position` on are not yet written. The fields are not annotated with shapes: as in any
    pytree, they may for a while hold something else than arrays.
    """

    keys: tuple[Any, ...]  # Float[Array, "batch length kv_heads head_dim"] each
    values: tuple[Any, ...]  # Likewise.
    position: Any  # Int32[Array, ""]: how many tokens are held.

    @property
    def length(self) -> int:
        """How many tokens fit."""
        return self.keys[0].shape[1]


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + epsilon) * scale`, computed in float32 whatever `x` is.

    Residual streams of real models reach 2e4, whose square bfloat16 holds too coarsely and float16
    not at all.
    """

    def __init__(self, width: int, *, epsilon: float, param_dtype: DType):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention in which `heads / kv_heads` neighbouring query heads share a key head."""

    def __init__(self, config: LlamaConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(
                inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        kv_width = config.kv_heads * config.head_dim
        self.q = linear(config.width, config.heads * config.head_dim, config.qkv_bias)
        self.k = linear(config.width, kv_width, config.qkv_bias)
        self.v = linear(config.width, kv_width, config.qkv_bias)
        self.o = linear(config.heads * config.head_dim, config.width, False)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        positions: Int32[Array, " length"],
        cache: tuple[Array, Array, Int32[Array, ""]] | None,
    ) -> tuple[Float[Array, "batch length width"], tuple[Array, Array]]:
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.config.head_dim)
        rotations = rotation(positions, self.config)
        q = rotate(self.q(x).reshape(heads), rotations)
        k = rotate(self.k(x).reshape(heads), rotations)
        v = self.v(x).reshape(heads)
        if cache is None:
            out = attend_to_itself(q, k, v)
        else:
            keys, values, position = cache
            zero = jnp.zeros_like(position)
            start = (zero, position, zero, zero)
            k = jax.lax.dynamic_update_slice(keys, k.astype(keys.dtype), start)
            v = jax.lax.dynamic_update_slice(values, v.astype(values.dtype), start)
            out = attend(q, k.astype(q.dtype), v.astype(q.dtype), positions)
        return self.o(out.reshape(batch, length, -1)), (k, v)


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs, outputs, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.gate = linear(config.width, config.hidden)
        self.up = linear(config.width, config.hidden)
        self.down = linear(config.hidden, config.width)

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    def __init__(self, config: LlamaConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(
            config.width, epsilon=config.norm_epsilon, param_dtype=param_dtype
        )
        self.attention = Attention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, epsilon=config.norm_epsilon, param_dtype=param_dtype)
        self.mlp = MLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        positions: Int32[Array, " length"],
        cache: tuple[Array, Array, Int32[Array, ""]] | None = None,
    ) -> tuple[Float[Array, "batch length width"], tuple[Array, Array]]:
        attended, kv = self.attention(self.attention_norm(x), positions, cache)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), kv


class Llama(nnx.Module):
    """Tokens to next-token logits.

    Weights are held in `param_dtype` and everything but norms, rotations, softmax and logits is
    computed in `dtype`; those four are in float32. Made under `nnx.eval_shape` it costs nothing.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embed = nnx.Embed(
            config.vocab_size, config.width, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.layers = nnx.List(
            [
                Block(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
                for _ in range(config.layers)
            ]
        )
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon, param_dtype=param_dtype)
        if not config.tied:
            self.head = nnx.Linear(
                config.width,
                config.vocab_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                preferred_element_type=jnp.float32,
                rngs=rngs,
            )

    def __call__(self, tokens: Int32[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
        """Logits (float32) of the token after each of `tokens`, given its row up to there."""
        return self.logits(self.features(tokens))

    def features(self, tokens: Int32[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """The normed last stream, from which `logits` are one matrix product away."""
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        x = self.embed(tokens)
        for block in self.layers:
            x, _ = block(x, positions)
        return self.norm(x)

    def logits(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows vocab"]:
        """Logits in float32, summed in float32 also when `dtype` is narrower."""
        if not self.config.tied:
            return self.head(x)
        # As `nnx.Embed.attend`, which would round the sums to `dtype`.
        embedding = self.embed.embedding[...].astype(self.dtype)
        return jax.lax.dot_general(
            x, embedding, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `length` tokens, in `dtype`."""
        shape = (batch, length, self.config.kv_heads, self.config.head_dim)
        layers = range(self.config.layers)
        return KVCache(
            keys=tuple(jnp.zeros(shape, self.dtype) for _ in layers),
            values=tuple(jnp.zeros(shape, self.dtype) for _ in layers),
            position=jnp.zeros((), jnp.int32),
        )

    def prefill(
        self, tokens: Int32[Array, "batch prompt"], length: int
    ) -> tuple[Float[Array, "batch one vocab"], KVCache]:
        """Logits of the token after the last of `tokens`, and a cache of `length` that holds them.

        As `decode` into an empty cache, but no query looks at rows that nothing was written to.
        """
        prompt = tokens.shape[1]
        if length < prompt:
            raise ValueError(
                f"A cache of {length} tokens cannot hold a prompt of {prompt}. Give a larger one."
            )
        positions = jnp.arange(prompt, dtype=jnp.int32)
        x = self.embed(tokens)
        keys, values = [], []
        for block in self.layers:
            x, held = block(x, positions)
            for rows, kept in zip(held, (keys, values), strict=True):
                room = ((0, 0), (0, length - prompt), (0, 0), (0, 0))
                kept.append(jnp.pad(rows.astype(self.dtype), room))
        return self.logits(self.norm(x[:, -1:])), KVCache(
            keys=tuple(keys), values=tuple(values), position=jnp.asarray(prompt, jnp.int32)
        )

    def decode(
        self, tokens: Int32[Array, "batch new"], cache: KVCache, *, last_only: bool = False
    ) -> tuple[Float[Array, "batch answered vocab"], KVCache]:
        """Logits of the token after each of `tokens`, which follow those in `cache`.

        With `last_only`, only of the token after the last. Serves for the prompt at once and for
        one token at a time. The caller sees to it that the cache has room: its position is data,
        and a write past the end would land on the last rows.
        """
        new = tokens.shape[1]
        positions = cache.position + jnp.arange(new, dtype=jnp.int32)
        x = self.embed(tokens)
        keys, values = [], []
        for block, k, v in zip(self.layers, cache.keys, cache.values, strict=True):
            x, (k, v) = block(x, positions, (k, v, cache.position))
            keys.append(k)
            values.append(v)
        logits = self.logits(self.norm(x[:, -1:] if last_only else x))
        return logits, KVCache(
            keys=tuple(keys), values=tuple(values), position=cache.position + new
        )

    @classmethod
    def abstract(
        cls, config: LlamaConfig, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "Llama":
        """The model with shapes in place of numbers."""
        return nnx.eval_shape(
            lambda: cls(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        )
