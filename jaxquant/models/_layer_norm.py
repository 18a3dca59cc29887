"""Layer normalization (Ba et al. 2016, arXiv:1607.06450) that is in float32 whatever goes in."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(var + epsilon) * scale + bias`, in the dtype of `x`.

    The variance is taken of the differences from the mean: as a difference of two squares, which
    is what `nn.LayerNorm` takes, that of a row far from zero would be lost.
    """

    epsilon: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        shape, along = (x.shape[-1],), (1,) * (x.ndim - 1) + (-1,)
        scale = self.param("scale", nn.initializers.ones_init(), shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, self.param_dtype)
        wide = x.astype(jnp.float32)
        away = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(away), axis=-1, keepdims=True)
        y = away * jax.lax.rsqrt(variance + self.epsilon)
        y = y * scale.astype(jnp.float32).reshape(along) + bias.astype(jnp.float32).reshape(along)
        return y.astype(x.dtype)
