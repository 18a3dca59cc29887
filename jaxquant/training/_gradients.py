"""Gradients in few bits: rounded at random, so that their expectation stays."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..qarray import dequantize, quantize_array, Scheme


def rounded_gradient(
    g: Float[Array, "..."],
    scheme: Scheme,
    *,
    contracted: tuple[int, ...],
    stack: tuple[int, ...] = (),
    seed: int = 0,
) -> Float[Array, "..."]:
    """What codes of `g` stand for, each rounded up or down with the odds that keep its expectation.

    The dice are made of `seed` and of the sum of magnitudes of `g`: no key has to be threaded
    through a model, every step and layer has its own, and the same step gives the same bits again.
    Rounding gradients to nearest instead would lose all that is smaller than half a gap (Gupta et
    al., "Deep Learning with Limited Numerical Precision", arXiv:1502.02551, section 3).
    """
    size = jnp.abs(g.astype(jnp.float32)).sum()
    key = jax.random.fold_in(jax.random.key(seed), lax.bitcast_convert_type(size, jnp.uint32))
    q = quantize_array(g, scheme, contracted=contracted, stack=stack, key=key)
    return dequantize(q, g.dtype)
