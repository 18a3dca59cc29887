"""Trees are taken apart into what is trained and what is not, and put together again."""

import jax
import jax.numpy as jnp
import nnx_models
import pytest
from flax import linen as nn, nnx

import jaxquant as jq
from jaxquant.numerics import INT8
from jaxquant.qarray import PER_CHANNEL, Scheme

W8 = Scheme(values=INT8, tile=PER_CHANNEL)
X = jnp.ones((3, 8))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))


def linen_case():
    model = Normed()
    variables = model.init(jax.random.key(0), X)
    rules = (jq.Rule(match="*", weights=W8),)
    plan = jq.plan(model, variables, X, recipe=jq.Recipe(name="w8", rules=rules))
    return jq.quantize(variables, plan)


def nnx_case():
    model = nnx_models.Tied(nnx.Rngs(0))
    ids = jnp.arange(6).reshape(2, 3)
    rules = (jq.Rule(match="*", weights=W8),)
    plan = jq.plan(model, nnx.state(model), ids, recipe=jq.Recipe(name="w8", rules=rules))
    return jq.quantize(nnx.state(model), plan)


@pytest.mark.parametrize("case", [linen_case, nnx_case])
@pytest.mark.parametrize("match", ["*", "*bias"])
def test_what_was_taken_apart_is_put_together(case, match):
    qvariables = case()
    trainable, frozen = jq.partition(qvariables, match=match)
    whole = jq.combine(trainable, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(qvariables)
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(qvariables), strict=True)
    assert all(a is b for a, b in pairs)
    counts = [len(jax.tree.leaves(part)) for part in (trainable, frozen)]
    assert sum(counts) == len(jax.tree.leaves(qvariables))
    assert counts[0] > 0


def test_what_has_no_gradient_cannot_be_asked_for():
    with pytest.raises(
        ValueError, match=r"'\*kernel' names no array .*, but 1 held as codes, which"
    ):
        jq.partition(linen_case(), match="*kernel")
    with pytest.raises(ValueError, match="'nothing' names no array that can be trained. Train oth"):
        jq.partition(linen_case(), match="nothing")


def test_codes_and_their_scales_are_frozen():
    trainable, frozen = jq.partition(linen_case())
    assert trainable["params"]["Dense_0"]["kernel"] is None
    assert isinstance(frozen["params"]["Dense_0"]["kernel"], jq.QArray)
    assert trainable["params"]["Dense_0"]["bias"].shape == (4,)


def test_labels_follow_the_collection_alone():
    tree = {"params": {"jaxquant": {"scale": jnp.ones(1)}}, "jaxquant": {"a": jnp.ones(1)}}
    labels = jq.training_labels(tree)
    assert labels == {"params": {"jaxquant": {"scale": "weights"}}, "jaxquant": {"a": "learned"}}
