"""Arrays on which quantization and every sum are exact, so that laws hold to the bit.

A weight's entries are whole numbers, and along each contracted axis one of them is -128, which sets
the scale: int8 codes hold them with a scale of 1. Inputs are small whole numbers. Products and sums
are whole numbers below 2**24, which float32 holds, in whatever order they are summed.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import jaxquant as jq

# The largest magnitude meets code -128: scales are divided by a power of two, hence exact.
LOWEST = jq.AbsMax(convention=jq.Convention.LOWEST)
W8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL, range=LOWEST)
W8A16 = jq.Recipe(name="w8a16", rules=(jq.Rule(match="*", weights=W8),))
W8A8 = jq.Recipe(name="w8a8", rules=(jq.Rule(match="*", weights=W8, activations=W8),))


def weight(*shape: int, contracted: tuple[int, ...] = (-2,), seed: int = 0) -> jax.Array:
    """A weight that int8 holds exactly, with a scale of 1 for each channel of `contracted`."""
    rng = np.random.default_rng(seed)
    w = rng.integers(-2, 3, shape).astype(np.float32)
    axes = tuple(sorted(a % len(shape) for a in contracted))
    peak = tuple(0 if a in axes else slice(None) for a in range(len(shape)))
    w[peak] = -128.0
    return jnp.asarray(w)


def inputs(*shape: int, seed: int = 1) -> jax.Array:
    """Whole numbers from -4 to 4."""
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32))


def small(x: jax.Array) -> jax.Array:
    """Keeps whole numbers small and their gradient what it is."""
    return jnp.clip(x, -4.0, 4.0)


class Applied(nn.Module):
    """Any function of an input and one parameter `w`, as a model."""

    function: object
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.zeros, self.shape)
        return self.function(x, w)


def wrapped(model, plan):
    """The model with the backend whose sums are exact here: of codes, scaled afterwards."""
    return jq.wrap(model, plan, backend="xla")


def dequantized(qvariables):
    """The variables that a quantized tree stands for, as the plain model takes them."""
    kept = {name: value for name, value in qvariables.items() if name != "jaxquant"}
    return jax.tree.map(
        lambda leaf: jq.dequantize(leaf) if isinstance(leaf, jq.QArray) else leaf,
        kept,
        is_leaf=lambda leaf: isinstance(leaf, jq.QArray),
    )


def compiled(function, *args):
    """`function(*args)` under `jit`, with outputs that are no arrays let through."""
    rest = []

    def arrays(*args):
        leaves, tree = jax.tree.flatten(function(*args))
        rest[:] = [tree, [None if isinstance(x, jax.Array) else (x,) for x in leaves]]
        return [x for x in leaves if isinstance(x, jax.Array)]

    found = iter(jax.jit(arrays)(*args))
    return jax.tree.unflatten(rest[0], [next(found) if x is None else x[0] for x in rest[1]])


def assert_close(got, want, dtype=jnp.float32):
    """Equal trees, up to the roundings of a small model that computes in `dtype`.

    There are at most seven layers of sixteen products and as many sums, each of which rounds; in
    bfloat16 only what a layer puts out is rounded. Other leaves than floats must be equal.
    """
    step = (7 * 32 if dtype == jnp.float32 else 7) * float(jnp.finfo(dtype).eps)
    assert jax.tree.structure(got) == jax.tree.structure(want)

    def compare(got, want):
        if not hasattr(want, "dtype") or not jnp.issubdtype(want.dtype, jnp.floating):
            assert type(got) is type(want)
            np.testing.assert_array_equal(got, want)
            return
        assert (got.dtype, got.shape, got.weak_type) == (want.dtype, want.shape, want.weak_type)
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        tolerance = step * np.nanmax(np.abs(want), initial=1)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)

    jax.tree.map(compare, got, want)
