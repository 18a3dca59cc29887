"""Adapters: nothing at first, then a product of low rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.training import LoRA


def test_it_starts_at_nothing_and_at_random():
    made = LoRA(rank=4).start(jax.random.key(0), stack=(3,), k=64, n=10)
    assert made["lora_a"].shape == (3, 64, 4) and made["lora_b"].shape == (3, 4, 10)
    assert not made["lora_b"].any()
    # 768 draws of variance 1 / 64: five standard errors of a variance.
    assert abs(made["lora_a"].var() * 64 - 1) < 5 * (2 / 768) ** 0.5


def test_what_it_adds():
    x, a, b = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(5, 8), (8, 2), (2, 3)])
    )
    found = LoRA(rank=2, alpha=6.0).product(x, a, b)
    np.testing.assert_allclose(
        found, 3.0 * (np.asarray(x) @ (np.asarray(a) @ b)), rtol=1e-4, atol=1e-5
    )
    assert LoRA(rank=2).product(x.astype(jnp.bfloat16), a, b).dtype == jnp.bfloat16


def test_a_rank_is_at_least_1():
    with pytest.raises(ValueError, match="a rank of at least 1, not 0"):
        LoRA(rank=0)
