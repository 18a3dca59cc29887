import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from jaxquant.intercept import PlanError
from jaxquant.intercept._graph import trace
from jaxquant.intercept._mark import Root


class Stacked(nn.Module):
    """Layers stored along any axis, and two loops inside each other."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        shape = [4, 4]
        shape.insert(self.axis, 3)
        kernels = self.param("kernels", nn.initializers.normal(), tuple(shape))

        def layer(x, kernel):
            return jnp.tanh(x @ kernel), None

        return jax.lax.scan(layer, x, jnp.moveaxis(kernels, self.axis, 0))[0]


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernels = self.param("kernels", nn.initializers.normal(), (2, 3, 4, 4))

        def inner(x, kernel):
            return jnp.tanh(x @ kernel), None

        def outer(x, kernels):
            return jax.lax.scan(inner, x, kernels)[0], None

        return jax.lax.scan(outer, x, kernels)[0]


class Halves(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernels = self.param("kernels", nn.initializers.normal(), (4, 4, 4))
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels[1:])[0]


X = jnp.ones((2, 4))


def graph_of(model):
    return trace(model, model.init(jax.random.key(0), X), X)


class Joined(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k = (self.param(name, nn.initializers.normal(), (4, 3)) for name in "qk")
        return x @ jnp.concatenate([q, k], axis=1)


def test_each_of_several_weights_put_together_gives_its_own_part():
    graph = graph_of(Joined())
    assert [graph.avals[step.outputs[0]].shape for step in graph.sites] == [(2, 3), (2, 3)]
    assert [graph.avals[x].shape for x in graph.outputs] == [(2, 6)]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_steps_name_the_stored_axis(axis):
    graph = graph_of(Stacked(axis=axis))
    roots = [step.mark.root for step in graph.sites]
    assert roots == [Root(path="kernels", steps=((axis, i),)) for i in range(3)]


def test_loops_inside_each_other():
    graph = graph_of(Nested())
    roots = [step.mark.root for step in graph.sites]
    assert roots == [
        Root(path="kernels", steps=((0, i), (1, j))) for i in range(2) for j in range(3)
    ]
    assert str(roots[-1]) == "kernels[1,2]"
    assert {step.mark.site for step in graph.sites} == {"kernels#dot"}


def test_a_scan_through_a_part_of_a_stack_is_refused():
    with pytest.raises(PlanError, match="kernels that is no slice"):
        graph_of(Halves())
