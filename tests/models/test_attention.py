"""Laws of rotary positions and grouped-query attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_configs import LLAMA as CONFIG

from jaxquant.models._attention import attend, attend_to_itself, rotate, rotation


def _random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def _by_the_formula(q, k, v):
    """In float64, head by head and query by query."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, head_dim = q.shape
    out = np.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            shared = h * k.shape[2] // heads
            for i in range(length):
                scores = k[b, : i + 1, shared] @ q[b, i, h] / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                out[b, i, h] = weights @ v[b, : i + 1, shared] / weights.sum()
    return out


@pytest.mark.parametrize("length", [1, 7, 128, 131])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_attention_is_the_formula(length, heads, kv_heads):
    q = _random(0, 2, length, heads, 8)
    k, v = _random(1, 2, length, kv_heads, 8), _random(2, 2, length, kv_heads, 8)
    np.testing.assert_allclose(attend_to_itself(q, k, v), _by_the_formula(q, k, v), atol=3e-6)


def test_sharing_a_key_head_is_repeating_it():
    q, k, v = _random(0, 2, 9, 6, 8), _random(1, 2, 9, 2, 8), _random(2, 2, 9, 2, 8)
    repeated = attend_to_itself(q, jnp.repeat(k, 3, axis=2), jnp.repeat(v, 3, axis=2))
    np.testing.assert_allclose(attend_to_itself(q, k, v), repeated, atol=1e-6)


def test_keys_after_the_query_are_not_seen():
    q, k, v = _random(0, 1, 3, 2, 8), _random(1, 1, 9, 2, 8), _random(2, 1, 9, 2, 8)
    positions = jnp.arange(4, 7, dtype=jnp.int32)
    seen = attend(q, k, v, positions)
    spoiled = attend(q, k.at[:, 7:].set(1e6), v.at[:, 7:].set(1e6), positions)
    np.testing.assert_array_equal(seen, spoiled)


def test_rotated_products_depend_on_the_distance_alone():
    q, k = _random(0, 1, 1, 1, 16), _random(1, 1, 1, 1, 16)

    def product(i, j):
        at = (rotation(jnp.asarray([position], jnp.int32), CONFIG) for position in (i, j))
        return jnp.sum(rotate(q, next(at)) * rotate(k, next(at)))

    np.testing.assert_allclose(product(5, 2), product(45, 42), rtol=1e-4)
    assert abs(product(5, 2) - product(5, 3)) > 1e-3


def test_position_zero_is_not_turned():
    x = _random(0, 1, 1, 2, 16)
    zero = rotation(jnp.zeros((1,), jnp.int32), CONFIG)
    np.testing.assert_array_equal(rotate(x, zero), x)


def test_the_pairs_turned_are_half_a_head_apart():
    x = jnp.zeros((1, 1, 1, 16), jnp.float32).at[..., 3].set(1.0)
    turned = rotate(x, rotation(jnp.asarray([2], jnp.int32), CONFIG))
    assert set(np.flatnonzero(np.asarray(turned).ravel())) == {3, 11}
    angle = 2 * 1e4 ** (-3 / 8)
    np.testing.assert_allclose(turned[0, 0, 0, 3], np.cos(angle), rtol=1e-6)
    np.testing.assert_allclose(turned[0, 0, 0, 11], np.sin(angle), rtol=1e-6)
