"""The Cholesky factor of a Gram matrix that may be singular: damped, and more if that fails."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

ATTEMPTS = 4
"""How often a factorization is tried, each time with ten times the damping."""


def damped_factor(
    gram: Float[Array, "k k"], mean: Float[Array, ""], damping: float
) -> tuple[Float[Array, "k k"], Float[Array, ""]]:
    """The lower triangular `C` of `C C^T = gram + damping * mean * I`, and the damping it took.

    Only the lower triangle of `gram` is read. Where a factorization fails, the next has ten times
    the damping; where all do, `C` is the identity and the damping infinite.
    """
    k = gram.shape[0]
    diagonal = jnp.eye(k, dtype=bool)

    def again(state: Any) -> Bool[Array, ""]:
        attempt, _, _, done = state
        return (attempt < ATTEMPTS) & ~done

    def attempt(state: Any) -> Any:
        count, last, _, _ = state
        now = jnp.where(count == 0, jnp.float32(damping), jnp.maximum(last * 10, 1e-6))
        damped = jnp.where(diagonal, gram + now * mean, gram)
        factor = lax.linalg.cholesky(damped, symmetrize_input=False)
        # It comes back full of NaN, or with some, or with a diagonal of infinities.
        done = jnp.isfinite(jnp.diagonal(factor)).all() & jnp.isfinite(factor[-1]).all()
        return count + 1, now, factor, done

    start = (jnp.int32(0), jnp.float32(damping), jnp.zeros_like(gram), jnp.asarray(False))
    _, used, factor, done = lax.while_loop(again, attempt, start)
    eye = jnp.eye(k, dtype=jnp.float32)
    factor = lax.cond(done, lambda: factor, lambda: eye)
    return factor, jnp.where(done, used, jnp.inf)


def made_up(
    w: Float[Array, "n k"],
    gram: Float[Array, "k k"],
    drift: Float[Array, "k k"],
    damping: float,
) -> tuple[Float[Array, "n k"], Bool[Array, ""]]:
    """`w d (gram + damping)^-1`: what to add, so that the outputs are those of float inputs.

    Nothing where the Gram matrix is not positive definite even so: the second result says.
    """
    mean = jnp.diagonal(gram).mean()
    ridge = np.float32(max(damping, 1e-4)) * jnp.where(mean == 0, 1.0, mean)
    damped = gram + ridge * jnp.eye(len(gram), dtype=gram.dtype)
    factor = jax.scipy.linalg.cho_factor(damped, lower=True)
    wanted = jnp.matmul(w, drift, precision=lax.Precision.HIGHEST)
    found = jax.scipy.linalg.cho_solve(factor, wanted.T).T
    solved = jnp.isfinite(found).all()
    return jnp.where(solved, found, 0.0), solved
