"""Models and the folds that they have: name -> (model, variables, arguments, apply), and lines."""

import dataclasses

import jax
import jax.numpy as jnp
import moe
import numpy as np
from flax import linen as nn, nnx
from tiny_configs import LLAMA

from jaxquant.models import Bert, BertConfig, GPT2, GPT2Config, Llama

TOKENS = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]], jnp.int32)
X = jnp.asarray(np.random.default_rng(3).normal(size=(2, 8, 8)).astype(np.float32))
SIZES = {
    "vocab_size": 48,
    "width": 32,
    "hidden": 64,
    "layers": 2,
    "heads": 4,
    "max_length": 16,
    "norm_epsilon": 1e-5,
}


def randomized(variables, seed=0):
    """Scales and biases that are neither one nor zero; the other leaves get noise as well."""
    rng = np.random.default_rng(seed)

    def noisy(x):
        return x + 0.3 * jnp.asarray(rng.normal(size=x.shape).astype(np.float32))

    return jax.tree.map(noisy, variables)


def linen(model, *args, **kwargs):
    variables = randomized(model.init(jax.random.key(0), *args, **kwargs))
    return model, variables, args, model.apply


def llama(**changes):
    model = Llama(dataclasses.replace(LLAMA, **changes), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    return model, randomized(state), (TOKENS,), lambda s, tokens: nnx.merge(graphdef, s)(tokens)


class Layers(nn.Module):
    """A chain of functions of `(x, dense)`; `dense(name, n)` makes a linear layer."""

    chain: tuple
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        def dense(name, n=8):
            return nn.Dense(n, use_bias=self.use_bias, name=name)

        for step in self.chain:
            x = step(x, dense)
        return x


def chain(*steps, use_bias=True):
    return lambda: linen(Layers(chain=steps, use_bias=use_bias), X)


def layer(name, n=8):
    return lambda x, dense: dense(name, n)(x)


def of(function):
    return lambda x, dense: function(x)


def norm(name="norm"):
    return lambda x, dense: nn.LayerNorm(name=name)(x)


def joined(x, dense):
    gate, up = jnp.split(dense("joined", 16)(x), 2, axis=-1)
    return nn.silu(gate) * up


def repeated(x, dense):
    """Two query heads share a key head, which is repeated."""
    q = dense("q", 8)(x).reshape(2, 8, 4, 2)
    k, v = (dense(name, 4)(x).reshape(2, 8, 2, 2) for name in "kv")
    k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
    return nn.dot_product_attention(q, k, v).reshape(2, 8, 8)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3,), name="a")(x))
        x = nn.max_pool(x, (2,), strides=(2,))
        return nn.Conv(5, (3,), name="b")(x)


class Raw(nn.Module):
    """A weight on the left of an einsum, stored in an order of its own."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (2, 4))
        w = self.param("w", nn.initializers.normal(1.0), (4, 6, 2))
        x = (x * scale.reshape(1, 1, 8)).reshape(2, 8, 2, 4)
        return jnp.einsum("knh,blhk->bln", w, x)


class Concatenated(nn.Module):
    """Two weights put together on the way."""

    @nn.compact
    def __call__(self, x):
        x = nn.RMSNorm(name="norm")(x)
        q, k = (self.param(name, nn.initializers.normal(1.0), (8, 6)) for name in "qk")
        return jnp.tanh(x @ jnp.concatenate([q, k], axis=1))


class Factorized(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Dense(12, name="project")(nn.Embed(48, 6, name="embed")(ids))


class Tied(nn.Module):
    """The head is the embedding."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(48, 8, name="embed")
        return embed.attend(nn.RMSNorm(name="norm")(jnp.tanh(embed(ids))))


class Experts(nn.Module):
    """Experts side by side: a stack of matrices, each with its own rows."""

    @nn.compact
    def __call__(self, x):
        x = nn.RMSNorm(name="norm")(x)
        up = self.param("up", nn.initializers.normal(1.0), (2, 8, 6))
        down = self.param("down", nn.initializers.normal(1.0), (2, 6, 8))
        hidden = nn.relu(jnp.einsum("ecd,edh->ech", x, up))
        return jnp.einsum("ech,ehd->ecd", hidden, down)


class Along1(nn.Module):
    """Layers stored along axis 1, and two loops inside each other."""

    @nn.compact
    def __call__(self, x):
        up = self.param("up", nn.initializers.normal(1.0), (2, 8, 3, 8))
        down = self.param("down", nn.initializers.normal(1.0), (2, 8, 3, 8))

        def inner(x, w):
            return x + nn.relu(x @ w[0]) @ w[1], None

        def outer(x, w):
            moved = tuple(jnp.moveaxis(part, 1, 0) for part in w)
            return jax.lax.scan(inner, jnp.tanh(x), moved)[0], None

        return jax.lax.scan(outer, x, (up, down))[0]


def per_layer(layers, *lines):
    return [line.replace("@", str(i)) for i in range(layers) for line in lines]


LLAMA_LINES = (
    "layers/@/attention_norm/scale -> layers/@/attention/{q,k,v}/kernel",
    "layers/@/attention/v/kernel -> layers/@/attention/o/kernel",
    "layers/@/mlp_norm/scale -> layers/@/mlp/{gate,up}/kernel",
    "layers/@/mlp/up/kernel -> layers/@/mlp/down/kernel",
)

CASES = {
    "llama": (llama, per_layer(2, *LLAMA_LINES)),
    "llama, a key head each, its own head": (
        lambda: llama(kv_heads=4, tied=False),
        [*per_layer(2, *LLAMA_LINES), "norm/scale -> head/kernel"],
    ),
    "llama with biases": (
        lambda: llama(qkv_bias=True),
        per_layer(
            2,
            LLAMA_LINES[0],
            "layers/@/attention/v/{bias,kernel} -> layers/@/attention/o/kernel",
            *LLAMA_LINES[2:],
        ),
    ),
    # Normed after the sum, so that the residual is the normed stream; and GELU between the linears.
    "bert": (
        lambda: linen(Bert(BertConfig(token_types=2, **SIZES)), TOKENS, TOKENS > 1),
        per_layer(2, "layers_@/value/{bias,kernel} -> layers_@/out/kernel"),
    ),
    "gpt2": (
        lambda: linen(GPT2(GPT2Config(**SIZES)), TOKENS),
        per_layer(
            2,
            "layers_@/attention_norm/{bias,scale} -> layers_@/qkv/kernel",
            "layers_@/qkv/{bias,kernel} -> layers_@/out/kernel",
            "layers_@/mlp_norm/{bias,scale} -> layers_@/up/kernel",
        ),
    ),
    "experts, scanned": (
        lambda: linen(moe.Decoder(scanned=True), moe.TOKENS),
        per_layer(
            3,
            "layers/RMSNorm_0/scale[@] -> layers/attention/{query,key,value}/kernel[@]",
            "layers/attention/value/{bias[@],kernel[@]} -> layers/attention/out/kernel[@]",
            "layers/RMSNorm_1/scale[@] -> layers/experts/router/kernel[@], layers/experts/up[@]",
            "layers/experts/up[@] -> layers/experts/down[@]",
        ),
    ),
    "experts, layers side by side": (
        lambda: linen(moe.Decoder(scanned=False), moe.TOKENS),
        per_layer(
            3,
            "layer_@/RMSNorm_0/scale -> layer_@/attention/{query,key,value}/kernel",
            "layer_@/attention/value/{bias,kernel} -> layer_@/attention/out/kernel",
            "layer_@/RMSNorm_1/scale -> layer_@/experts/router/kernel, layer_@/experts/up",
            "layer_@/experts/up -> layer_@/experts/down",
        ),
    ),
    "linear to linear": (chain(layer("a"), layer("b")), ["a/{bias,kernel} -> b/kernel"]),
    "relu between": (
        chain(layer("a"), of(nn.relu), layer("b")),
        ["a/{bias,kernel} -> b/kernel"],
    ),
    "leaky relu between": (
        chain(layer("a"), of(nn.leaky_relu), layer("b")),
        ["a/{bias,kernel} -> b/kernel"],
    ),
    "gelu between": (chain(layer("a"), of(nn.gelu), layer("b")), []),
    "squared relu between": (chain(layer("a"), of(lambda x: nn.relu(x) ** 2), layer("b")), []),
    "norm to linear": (chain(norm(), layer("a")), ["norm/{bias,scale} -> a/kernel"]),
    "normed residual": (
        chain(lambda x, dense: (y := nn.RMSNorm(name="norm")(x)) + dense("a")(y)),
        [],
    ),
    "half of a joined linear": (
        chain(joined, layer("down"), use_bias=False),
        ["joined/kernel -> down/kernel"],
    ),
    "repeated heads": (chain(repeated, layer("out")), ["v/{bias,kernel} -> out/kernel"]),
    # Both factors could be divided: the last one is.
    "gate without a curve": (
        chain(lambda x, dense: nn.relu(dense("gate")(x)) * dense("up")(x), layer("down")),
        ["up/{bias,kernel} -> down/kernel"],
    ),
    "a factor after a linear": (
        chain(layer("a"), of(lambda x: x * 0.5), norm("n"), layer("b")),
        ["n/{bias,scale} -> b/kernel"],
    ),
    "half of an input": (
        chain(
            lambda x, dense: jnp.concatenate([nn.RMSNorm(name="norm")(x), jnp.tanh(x)], -1),
            layer("a"),
        ),
        ["norm/scale -> a/kernel"],
    ),
    # The second linear reads its inputs in another order than the first.
    "two orders of one input": (
        chain(
            lambda x, dense: dense("a")(y := nn.RMSNorm(name="norm")(x)) + dense("b")(y[..., ::-1])
        ),
        [],
    ),
    "convolutions": (
        lambda: linen(Convolutions(), X),
        ["a/{bias,kernel} -> b/kernel"],
    ),
    "a weight on the left": (lambda: linen(Raw(), X), ["scale -> w"]),
    "weights put together": (lambda: linen(Concatenated(), X), ["norm/scale -> q, k"]),
    "factorized embedding": (
        lambda: linen(Factorized(), TOKENS),
        ["embed/embedding -> project/kernel"],
    ),
    "tied embedding": (lambda: linen(Tied(), TOKENS), []),
    "stacked experts": (
        lambda: linen(Experts(), X),
        ["norm/scale -> up", "up -> down"],
    ),
    "loops inside each other": (
        lambda: linen(Along1(), X),
        [f"up[{i},{j}] -> down[{i},{j}]" for i in range(2) for j in range(3)],
    ),
}
