"""A small residual network with batch norm, and a small vision transformer: plain Linen models.

Nothing here knows of quantization.
"""

import jax
import jax.numpy as jnp
from fashion_mnist import CLASSES
from flax import linen as nn


class Residual(nn.Module):
    """Two 3 x 3 convolutions and what they are added to; the first one may take every second."""

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def norm(y: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)

        y = nn.Conv(self.features, (3, 3), self.strides, use_bias=False, name="one")(x)
        y = nn.relu(norm(y))
        y = norm(nn.Conv(self.features, (3, 3), use_bias=False, name="two")(y))
        if y.shape != x.shape:
            x = norm(nn.Conv(self.features, (1, 1), self.strides, use_bias=False, name="skip")(x))
        return nn.relu(x + y)


class CNN(nn.Module):
    """153,770 parameters; every convolution reads what a ReLU put out."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(32, (3, 3), 2, use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = Residual(32, name="a")(x, train)
        x = Residual(64, strides=2, name="b")(x, train)
        x = Residual(64, name="c")(x, train)
        return nn.Dense(CLASSES, name="head")(jnp.mean(x, axis=(1, 2)))


class Encoder(nn.Module):
    """A block of the transformer, norms first; a ReLU in the middle, so that it is not negative."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(num_heads=self.heads, name="attention")
        x = x + attention(nn.LayerNorm()(x))
        y = nn.Dense(2 * width, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(width, name="down")(nn.relu(y))


class ViT(nn.Module):
    """139,018 parameters: 49 patches of 4 x 4 pixels, four blocks, the mean of what comes out."""

    width: int = 64
    layers: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        patches = x.reshape(-1, 7, 4, 7, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 49, 16)
        x = nn.Dense(self.width, name="stem")(patches)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, 49, self.width))
        for i in range(self.layers):
            x = Encoder(self.heads, name=f"block{i}")(x)
        return nn.Dense(CLASSES, name="head")(jnp.mean(nn.LayerNorm()(x), axis=1))


NETWORKS = {"cnn": CNN(), "vit": ViT()}
