"""Observers: statistics of what flows into a site, which add up over batches and devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def _zeros(struct: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), struct)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Row count, sums of magnitudes and of squares, per contracted channel."""

    name: str = "moments"

    def measure(self, x: Float[Array, "*stack rows k"]) -> dict[str, Array]:
        # Counted from `x`, so that inside `shard_map` the count varies with the rows it counts.
        one = jnp.where(jnp.isnan(x[..., 0]), 1.0, 1.0)
        return {
            "rows": one.sum(axis=-1),
            "magnitude": jnp.abs(x).sum(axis=-2),
            "square": jnp.square(x).sum(axis=-2),
        }

    def merge(self, a: Any, b: Any) -> Any:
        return jax.tree.map(jnp.add, a, b)

    def empty(self, struct: Any) -> Any:
        return _zeros(struct)

    def reduce(self, x: Any, axes: tuple[str, ...]) -> Any:
        return lax.psum(x, axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """The largest magnitude per contracted channel."""

    name: str = "peak"

    def measure(self, x: Float[Array, "*stack rows k"]) -> Float[Array, "*stack k"]:
        return jnp.abs(x).max(axis=-2)

    def merge(self, a: Any, b: Any) -> Any:
        return jnp.maximum(a, b)

    def empty(self, struct: Any) -> Any:
        return _zeros(struct)

    def reduce(self, x: Any, axes: tuple[str, ...]) -> Any:
        return lax.pmax(x, axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gram:
    """`x^T x` in float32: all that second-order algorithms need to know of the inputs."""

    name: str = "gram"

    def measure(self, x: Float[Array, "*stack rows k"]) -> Float[Array, "*stack k k"]:
        return jnp.einsum("...rk,...rl->...kl", x, x, precision=lax.Precision.HIGHEST)

    def merge(self, a: Any, b: Any) -> Any:
        return a + b

    def empty(self, struct: Any) -> Any:
        return _zeros(struct)

    def reduce(self, x: Any, axes: tuple[str, ...]) -> Any:
        return lax.psum(x, axes)


Observer = Moments | Peak | Gram
