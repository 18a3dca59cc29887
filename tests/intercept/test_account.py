"""Accounts: every site once, numbers by hand, whatever the order of leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxquant as jq
from jaxquant.algorithms import quantize
from jaxquant.intercept import Account
from jaxquant.qarray import weight_error

INT4_G4 = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=4), scale=jq.BFLOAT16)
INT8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
RECIPE = jq.Recipe(
    name="mixed",
    rules=(
        jq.Rule(match="head/*"),
        jq.Rule(match="layers/*", weights=INT4_G4),
        jq.Rule(match="*", weights=INT8, activations=INT8),
    ),
)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8, use_bias=False, name="up")(x), None


class Model(nn.Module):
    """An embedding that is looked up and multiplied with, three scanned layers, and a head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(12, 8, name="embed")
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(
            name="layers"
        )
        x, _ = layers(embed(tokens), None)
        return embed.attend(nn.Dense(8, name="head")(x))


TOKENS = jnp.zeros((2, 3), jnp.int32)


@pytest.fixture(scope="module")
def made():
    variables = Model().init(jax.random.key(0), TOKENS)
    plan = jq.plan(Model(), variables, TOKENS, recipe=RECIPE)
    return variables, plan, *quantize(variables, plan, account=True)


def test_sites_by_hand(made):
    variables, _, qvariables, account = made
    sites = {site.site: site for site in account.sites}
    assert list(sites) == ["embed/embedding#take", "layers/up/kernel#dot", "head/kernel#dot"] + [
        "embed/embedding#dot"
    ]
    # One row for three layers: 3 x 64 codes of 4 bits, 3 x 2 x 8 scales of 16.
    stack = sites["layers/up/kernel#dot"]
    assert (stack.shape, stack.bits_per_value) == ((3, 8, 8), 4 + 16 / 4)
    assert (stack.rule, stack.reason, stack.weights) == ("layers/*", None, INT4_G4)
    w = variables["params"]["layers"]["up"]["kernel"]
    assert stack.error == weight_error(w, qvariables["params"]["layers"]["up"]["kernel"])
    off = np.asarray(jq.dequantize(qvariables["params"]["layers"]["up"]["kernel"]) - w)
    by_hand = 10 * np.log10(np.square(w).sum() / np.square(off).sum())
    assert stack.sqnr_db == pytest.approx(by_hand, rel=1e-4)
    left = sites["head/kernel#dot"]
    assert (left.weights, left.error, left.bits_per_value) == (None, None, 32.0)
    assert (left.rule, left.reason) == ("head/*", "left by the rule 'head/*'")
    # A weight with two sites has one error, and is told of twice.
    take, dot = sites["embed/embedding#take"], sites["embed/embedding#dot"]
    assert take.error == dot.error and take.error is not None
    assert (take.activations, dot.activations) == (None, INT8)


def test_totals_count_each_parameter_once(made):
    variables, plan, qvariables, account = made
    sizes = [x.size for x in jax.tree.leaves(variables)]
    assert account.parameters == sum(sizes) == 12 * 8 + 3 * 64 + 64 + 8
    assert (account.quantized, account.left) == (3, 1)
    assert account.bytes_before == 4 * sum(sizes)
    # The embedding has a scale for each of its rows or columns, whichever the sites agree on.
    embed = qvariables["params"]["embed"]["embedding"].nbytes
    assert account.bytes_after == embed + 3 * 64 + 4 * (64 + 8) == plan.bytes_after
    assert account.bits_per_weight == 8 * account.bytes_after / account.parameters


def test_numbers_do_not_depend_on_the_order_of_leaves(made):
    variables, plan, _, account = made
    turned = {"params": dict(reversed(variables["params"].items()))}
    assert list(turned["params"]) != list(variables["params"])
    again = quantize(turned, plan, account=True)[1]
    assert again == account and str(again) == str(account)
    assert [path for path, _ in account.errors] == [leaf.path for leaf in plan.leaves]


def test_before_quantizing_there_is_all_but_the_noise(made):
    _, plan, _, account = made
    before = Account(plan=plan)
    assert all(site.error is None and site.sqnr_db is None for site in before.sites)
    assert [s.bits_per_value for s in before.sites] == [s.bits_per_value for s in account.sites]
    assert str(before) == str(plan)
    assert "SQNR" not in str(plan) and "SQNR dB" in str(account)
