import jax
import jax.numpy as jnp
import moe
import numpy as np
import pytest
from flax import linen as nn, nnx
from tiny_configs import LLAMA

import jaxquant as jq
from jaxquant.intercept._graph import evaluate_step, Graph, trace, Value
from jaxquant.intercept._variables import parameters
from jaxquant.models import Llama


def root_array(params, root):
    array = np.asarray(params[root.path])
    for axis, index in sorted(root.steps, reverse=True):
        array = np.take(array, index, axis=axis)
    return jnp.asarray(array)


def evaluate(graph: Graph, variables, *args):
    params = parameters(variables)
    leaves = jax.tree.leaves(variables)
    values = {v: root_array(params, root) for v, root in graph.roots.items()}
    values |= {v: leaves[i] for v, i in graph.variables.items()}
    values |= {v: jnp.asarray(x) for v, x in graph.constants.items()}
    values |= dict(zip(graph.arguments, args, strict=True))
    for step in graph.steps:
        values.update(zip(step.outputs, evaluate_step(step, values), strict=True))
    return [values[x] if isinstance(x, Value) else x.val for x in graph.outputs]


def moe_model(scanned):
    model = moe.Decoder(scanned=scanned)
    return model, model.init(jax.random.key(0), moe.TOKENS), moe.TOKENS, model.apply


def llama():
    model = Llama(LLAMA, rngs=nnx.Rngs(0))
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) % LLAMA.vocab_size
    return model, nnx.state(model), tokens, lambda state, tokens: model(tokens)


class Branch(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (4, 4))
        return jax.lax.cond(x.sum() > 0, lambda: x @ kernel, lambda: x)


CASES = {
    "scanned": lambda: moe_model(True),
    "side by side": lambda: moe_model(False),
    "llama": llama,
}


@pytest.mark.parametrize("case", CASES)
def test_evaluating_the_steps_gives_what_the_model_gives(case):
    model, variables, tokens, apply = CASES[case]()
    graph = trace(model, variables, tokens)
    (out,) = evaluate(graph, variables, tokens)
    wanted = apply(variables, tokens)
    # The same equations one by one and fused: sums in another order.
    np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)


def test_every_layer_of_a_scan_is_a_root_and_has_the_sites_of_the_plan():
    model, variables, tokens, _ = moe_model(True)
    recipe = jq.Recipe(name="all", rules=(jq.Rule(match="*"),))
    plan = jq.plan(model, variables, tokens, recipe=recipe)
    graph = trace(model, variables, tokens)
    assert {step.mark.site for step in graph.sites} == set(plan.by_site)
    for site in plan.sites:
        roots = [str(s.mark.root) for s in graph.sites if s.mark.site == site.site]
        layers = range(moe.LAYERS) if site.path.startswith("layers/") else [None]
        assert roots == [site.path if i is None else f"{site.path}[{i}]" for i in layers]


def test_what_depends_on_the_arguments_is_told_from_what_does_not():
    model, variables, tokens, _ = llama()
    graph = trace(model, variables, tokens)
    for site in graph.sites:
        weight = site.inputs[site.mark.use.side]
        assert weight not in graph.moving
        assert site.outputs[0] in graph.moving


def test_shapes_suffice():
    model, variables, tokens, _ = moe_model(True)
    shapes = jax.eval_shape(lambda: variables)
    graph = trace(model, shapes, jax.ShapeDtypeStruct(tokens.shape, tokens.dtype))
    assert len(graph.sites) == len(trace(model, variables, tokens).sites)


def test_a_parameter_inside_of_control_flow_is_named():
    x = jnp.ones((2, 4))
    made = Branch()
    graph = trace(made, made.init(jax.random.key(0), x), x)
    assert list(graph.unreached) == ["kernel"]
    assert "cond" in graph.unreached["kernel"]
