"""Adapters beside frozen weights compute what the merged weight would."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxquant as jq
from jaxquant.numerics import INT8, NF4
from jaxquant.qarray import dequantize, PER_CHANNEL, Scheme, schemes, Tile
from jaxquant.training import LoRA

HELD = Scheme(values=NF4, tile=Tile(contracted=16))
ADAPTER = LoRA(rank=3, alpha=6.0)
X = jax.random.normal(jax.random.key(3), (4, 6, 32))


class Heads(nn.Module):
    """Kernels `[d, heads, width]` and `[heads, width, d]`."""

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((4, 8))(x)
        return nn.DenseGeneral(32, axis=(-2, -1))(x)


class Turned(nn.Module):
    """A weight on the left, and one that is stored by output."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (16, 32))
        v = self.param("v", nn.initializers.lecun_normal(), (16, 5))
        return jnp.einsum("kn,btk->nbt", v, jnp.einsum("btd,hd->bth", x, w))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def layer(module, x, _):
            return nn.tanh(module(x)), None

        scan = nn.scan(layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return scan(nn.Dense(32), x, None)[0]


class Experts(nn.Module):
    """A batched product: one weight for each entry of the first axis."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(batch_axis=0), (4, 32, 7))
        return jnp.einsum("btd,bdn->btn", x, w)


def prepared(model, scheme=HELD, **rule):
    variables = model.init(jax.random.key(0), X)
    rules = (jq.Rule(match="*", weights=scheme, adapter=ADAPTER, **rule),)
    plan = jq.plan(model, variables, X, recipe=jq.Recipe(name="qlora", rules=rules))
    qvariables = jq.quantize(variables, plan)
    return variables, plan, jq.add_adapters(qvariables, plan, jax.random.key(1))


def moved(qvariables):
    """The same with `lora_b` that is not zero."""

    def one(path, x):
        if "lora_b" not in jax.tree_util.keystr(path):
            return x
        return jax.random.normal(jax.random.key(5), x.shape) * 0.1

    return jax.tree_util.tree_map_with_path(one, qvariables)


def merged(variables, plan, qvariables):
    """The float model's variables, with each weight as its codes and its adapter make it."""
    for site in plan.sites:
        own, leaf = qvariables["jaxquant"]["sites"][site.site], plan.by_path[site.path]
        *folder, name = site.path.split("/")
        at, held = variables["params"], qvariables["params"]
        for part in folder:
            at, held = at[part], held[part]
        added = 2.0 * jnp.matmul(own["lora_a"], own["lora_b"])
        rest = [a for a in range(len(leaf.shape)) if a not in leaf.stack + leaf.contracted]
        order = (*leaf.stack, *leaf.contracted, *rest)
        added = added.reshape([leaf.shape[a] for a in order]).transpose(np.argsort(order))
        at[name] = dequantize(held[name]) + added
    return variables


@pytest.mark.parametrize(
    "model", [Heads(), Turned(), Scanned(), Experts()], ids=lambda m: type(m).__name__
)
def test_it_is_the_merged_weight(model):
    variables, plan, qvariables = prepared(model)
    qmodel = jq.wrap(model, plan)
    np.testing.assert_array_equal(
        qmodel.apply(qvariables, X), qmodel.apply(jq.quantize(variables, plan), X)
    )
    after = moved(qvariables)
    found = jax.jit(qmodel.apply)(after, X)
    expected = model.apply(merged(variables, plan, after), X)
    assert abs(found - qmodel.apply(qvariables, X)).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model", [Heads(), Turned(), Scanned(), Experts()], ids=lambda m: type(m).__name__
)
def test_of_a_frozen_weight_codes_are_kept_for_the_way_back(model):
    """And gradients of what comes before it are those of the merged weight."""
    variables, plan, qvariables = prepared(model)
    qvariables = moved(qvariables)
    apply = jq.wrap(model, plan).apply

    def gradient(apply, variables):
        return jax.jit(jax.grad(lambda x: jnp.sin(apply(variables, x)).sum()))(X)

    found = gradient(apply, qvariables)
    expected = gradient(model.apply, merged(variables, plan, qvariables))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    adapters, frozen = jq.partition(qvariables, match="jaxquant/*")
    _, pull = jax.vjp(lambda a: apply(jq.combine(a, frozen), X), adapters)
    shapes = [leaf.shape for leaf in plan.leaves]
    kept = [x for x in jax.tree.leaves(pull) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert kept and not [x.shape for x in kept if x.shape in shapes or x.shape[1:] in shapes]


def test_adapters_learn_and_codes_stay():
    """QLoRA: a frozen base in NF4 with double quantization."""
    model = Heads()
    _, plan, qvariables = prepared(model, dataclasses.replace(schemes.NF4_DOUBLE, tile=HELD.tile))
    qmodel = jq.wrap(model, plan)
    adapters, frozen = jq.partition(qvariables, match="jaxquant/*")
    assert len(jax.tree.leaves(adapters)) == 4

    @jax.jit
    def step(adapters):
        def loss(adapters):
            return jnp.square(qmodel.apply(jq.combine(adapters, frozen), X) - 1).mean()

        value, g = jax.value_and_grad(loss)(adapters)
        return jax.tree.map(lambda a, b: a - 0.05 * b, adapters, g), value

    losses = []
    for _ in range(40):
        adapters, value = step(adapters)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    before, after = (t["params"] for t in (qvariables, jq.combine(adapters, frozen)))
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    assert all((a == b).all() for a, b in pairs)


def test_rounded_activations_leave_the_adapter_s_alone():
    _, plan, qvariables = prepared(
        Turned(),
        Scheme(values=INT8, tile=PER_CHANNEL),
        activations=Scheme(values=INT8, tile=PER_CHANNEL),
    )
    qmodel, after = jq.wrap(Turned(), plan), moved(qvariables)
    assert abs(qmodel.apply(after, X) - qmodel.apply(qvariables, X)).max() > 0.01


def test_what_is_refused():
    model = Turned()
    variables = model.init(jax.random.key(0), X)
    plan = jq.plan(
        model, variables, X, recipe=jq.Recipe(name="w", rules=(jq.Rule(match="*", weights=HELD),))
    )
    with pytest.raises(ValueError, match="No site of the plan .* has an adapter"):
        jq.add_adapters(jq.quantize(variables, plan), plan, jax.random.key(0))
    with pytest.raises(ValueError, match="has an adapter, which stands beside weights"):
        jq.Rule(match="*", adapter=ADAPTER)
    images, convolution = jnp.ones((1, 8, 8, 3)), nn.Conv(4, (3, 3))
    rule = jq.Rule(match="*", weights=Scheme(values=INT8, tile=PER_CHANNEL), adapter=ADAPTER)
    with pytest.raises(jq.PlanError, match="is no dot, and only dots have adapters"):
        jq.plan(
            convolution,
            convolution.init(jax.random.key(0), images),
            images,
            recipe=jq.Recipe(name="conv", rules=(rule,)),
        )
