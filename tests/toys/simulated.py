"""Toys in mode simulate: their plans and variables, and fake quantization written out."""

import jax
import jax.numpy as jnp
from linen_models import Case

import jaxquant as jq

W4 = jq.Scheme(values=jq.INT4, tile=jq.PER_CHANNEL)
W8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
A8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
TENSOR4, TENSOR4_UNSIGNED = (
    jq.Scheme(values=values, tile=jq.PER_TENSOR) for values in (jq.INT4, jq.formats.UINT4)
)


def started(case: Case, **rule):
    """A plan whose one rule has these fields, and variables ready to be trained by it."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    kept = {k: v for k, v in case.options().items() if k in ("train", "scale", "flag")}
    variables = jax.jit(lambda *args: case.model.init(rngs, *args, **kept))(*case.args)
    variables.pop("intermediates", None)
    left = (jq.Rule(match=path, optional=True) for path in case.left)
    recipe = jq.Recipe(name="r", rules=(*left, jq.Rule(match="*", **rule)))
    plan = jq.plan(case.model, variables, *case.args, recipe=recipe, **case.options())
    return plan, jq.start_training(case.model, variables, plan)


def unquantized(tvariables):
    """The model's own variables."""
    return {name: part for name, part in tvariables.items() if name != "jaxquant"}


def weighed(out):
    """A loss of the first floats that a model puts out; each has a gradient of its own."""
    leaves = (x for x in jax.tree.leaves(out) if isinstance(x, jax.Array) and x.ndim > 1)
    y = next(leaves).astype(jnp.float32)
    return (y * jnp.sin(1.0 + jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum()


def fake(leaf, w):
    """What codes of `w` stand for, with the derivative of `w` itself."""
    q = jq.quantize_array(w, leaf.scheme, contracted=leaf.contracted, stack=leaf.stack)
    return w + jax.lax.stop_gradient(jq.dequantize(q) - w)


def faked(function, params, plan):
    """`function(leaf's plan, array)` in place of each array that a plan quantizes."""

    def name(key):
        return jax.tree_util.keystr((key,), simple=True)

    def one(keys, x):
        # What boxes of metadata hold is an attribute of theirs.
        names = [name(key) for key in keys if not isinstance(key, jax.tree_util.GetAttrKey)]
        leaf = plan.by_path.get("/".join(names))
        return x if leaf is None else function(leaf, x)

    return jax.tree_util.tree_map_with_path(one, params)


def assert_near(got, want, dtype=jnp.float32):
    """Two orders of sums of at most 16 products, through seven layers there and seven back."""
    share = 14 * 32 * float(jnp.finfo(dtype).eps)

    def compare(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert jnp.abs(a - b).max() <= share * max(1.0, float(jnp.abs(b).max()))

    jax.tree.map(compare, got, want)
