"""Small NNX models: parameters, running statistics, streams, caches, sown values, layers."""

import jax
import jax.numpy as jnp
from flax import nnx

D = 8


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.norm = nnx.BatchNorm(2 * D, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x):
        return self.down(self.hidden(x))

    def hidden(self, x):
        h = self.drop(self.norm(self.up(x)))
        self.sow(nnx.Intermediate, "seen", h)
        return h


class Attending(nnx.Module):
    """Decodes one position a call, from a cache."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=D, qkv_features=D, decode=True, rngs=rngs
        )

    def __call__(self, x):
        return self.attention(x)


class Tied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, D, rngs=rngs)
        self.up = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(self.up(self.embed(ids)))


class Listed(nnx.Module):
    """Layers in a list, one of them shared, and a raw parameter."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(2)])
        self.again = self.layers[0]
        self.w = nnx.Param(jax.random.normal(rngs.params(), (2, D, 4)))

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        x = self.again(x)
        return jnp.einsum("nd,hdk->nhk", x, self.w[...])


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.linear(x))


class Scanned(nnx.Module):
    """Layers stacked by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs):
            return Layer(rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return layer(x)

        return forward(x, self.layers)
