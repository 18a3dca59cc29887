"""Statistics at several places leave compiled functions once."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.intercept._shared import share, unshare


def _tree(x):
    gram = x.T @ x
    return {"k": {"gram": gram, "peak": x.max(0)}, "q": {"gram": gram}, "same": x.T @ x}


def test_an_array_at_several_places_leaves_a_compiled_function_once():
    x = jnp.arange(6.0).reshape(2, 3)
    found = jax.jit(lambda x: share(_tree(x)))(x)
    assert len(found.arrays) == 3
    tree = unshare(found)
    assert tree["k"]["gram"] is tree["q"]["gram"]
    assert tree["same"] is not tree["q"]["gram"]
    jax.tree.map(np.testing.assert_array_equal, tree, _tree(x))


def test_it_goes_through_a_scan():
    xs = jnp.arange(12.0).reshape(2, 2, 3)
    _, found = jax.lax.scan(lambda c, x: (c, share(_tree(x))), 0.0, xs)
    tree = unshare(found)
    assert tree["k"]["gram"] is tree["q"]["gram"]
    assert tree["q"]["gram"].shape == (2, 3, 3)


def test_nothing_is_something_to_share():
    assert unshare(share({})) == {}
