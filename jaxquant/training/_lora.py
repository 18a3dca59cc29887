"""Low-rank adapters beside a frozen weight: `y = x W + (x A) B alpha / rank`.

Hu et al., "LoRA" (arXiv:2106.09685), section 4.1: `A` starts at random, `B` at zero, so that
nothing changes at first. On weights in NF4 with double quantization it is QLoRA (Dettmers et al.,
arXiv:2305.14314).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Adapters of `rank`, whose product counts `alpha / rank`."""

    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"An adapter has a rank of at least 1, not {self.rank}.")

    def start(
        self, key: Array, *, stack: tuple[int, ...], k: int, n: int
    ) -> dict[str, Float[Array, "*stack rows columns"]]:
        """`lora_a` `[*stack, k, rank]`, of variance `1 / k`, and `lora_b` `[*stack, rank, n]`."""
        a = jax.random.normal(key, (*stack, k, self.rank), jnp.float32) * k**-0.5
        return {"lora_a": a, "lora_b": jnp.zeros((*stack, self.rank, n), jnp.float32)}

    def product(
        self,
        x: Float[Array, "*batch rows k"],
        a: Float[Array, "*batch k rank"],
        b: Float[Array, "*batch rank n"],
    ) -> Float[Array, "*batch rows n"]:
        """What the adapter adds, in the dtype of `x`."""
        return (x @ a.astype(x.dtype)) @ b.astype(x.dtype) * (self.alpha / self.rank)
