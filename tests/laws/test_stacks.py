"""What is quantized in a stack is what is quantized alone, bit for bit: layers and experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe import Decoder, EXPERTS, LAYERS, TOKENS, unstacked
from quantized import same_bits, SCHEMES

import jaxquant as jq
from jaxquant.qarray import quantize_array, schemes, Tile

HELD = {
    "int8 channel": SCHEMES["int8 channel"],
    "int8 tensor": SCHEMES["int8 tensor"],
    "int8 zero channel": SCHEMES["int8 zero channel"],
    "int4 g8": dataclasses.replace(SCHEMES["int4 signed g32"], tile=Tile(contracted=8)),
    "int4 ragged": dataclasses.replace(
        SCHEMES["int4 channel"], tile=Tile(contracted=12, ragged=True)
    ),
    "e4m3 channel": SCHEMES["e4m3 channel"],
    "nf4 g16": dataclasses.replace(schemes.NF4, tile=Tile(contracted=16)),
    "mxfp4 g16": dataclasses.replace(schemes.MXFP4, tile=Tile(contracted=16)),
    "nvfp4": schemes.NVFP4,
}


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Decoder(scanned=True).init)(jax.random.key(0), TOKENS)


def _quantized(model, variables, scheme):
    """From shapes, rules and parameters alone: no model runs."""
    rules = (jq.Rule(match="*norm*", optional=True), jq.Rule(match="*", weights=scheme))
    shapes = jax.eval_shape(lambda: variables)
    ids = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
    plan = jq.plan(model, shapes, ids, recipe=jq.Recipe(name="r", rules=rules))
    return plan, jq.quantize(variables, plan)


def _equal(a: jq.QArray, b: jq.QArray) -> bool:
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    return a.shape == b.shape and all(map(same_bits, *leaves))


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, jq.QArray))


@pytest.mark.parametrize("name", HELD)
def test_a_scanned_layer_is_that_layer_alone(variables, name: str):
    _, stacked = _quantized(Decoder(scanned=True), variables, HELD[name])
    alone = {"params": unstacked(variables["params"])}
    _, each = _quantized(Decoder(scanned=False), alone, HELD[name])
    got, want = _leaves(unstacked(stacked["params"])), _leaves(each["params"])
    assert [path for path, _ in got] == [path for path, _ in want]
    pairs = [(a, b) for (_, a), (_, b) in zip(got, want, strict=True) if isinstance(b, jq.QArray)]
    assert len(pairs) == 1 + LAYERS * 7
    assert all(_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", HELD)
def test_an_expert_is_that_expert_alone(variables, name: str):
    plan, stacked = _quantized(Decoder(scanned=True), variables, HELD[name])
    for leaf in ("up", "down"):
        site = plan.by_site[f"layers/experts/{leaf}#ragged_dot"]
        assert site.roles == ("stack", "batch", "contracted", "kept")
        held = stacked["params"]["layers"]["experts"][leaf]
        plain = variables["params"]["layers"]["experts"][leaf]
        run = jax.jit(lambda w: quantize_array(w, HELD[name], contracted=(0,)))
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                one = jax.tree.map(lambda part, at=(layer, expert): part[at], held)
                assert _equal(one, run(plain[layer, expert]))


@pytest.mark.parametrize("activations", [None, SCHEMES["int8 channel"]], ids=["w8a16", "w8a8"])
def test_the_scanned_decoder_computes_what_the_other_does(variables, activations):
    scheme = SCHEMES["int8 channel"]
    rule = jq.Rule(match="*", weights=scheme, activations=activations)
    recipe = jq.Recipe(name="r", rules=(rule,))
    outs = []
    for scanned in (True, False):
        model = Decoder(scanned=scanned)
        given = variables if scanned else {"params": unstacked(variables["params"])}
        plan = jq.plan(model, given, TOKENS, recipe=recipe)
        prepared = jq.prepare(jq.quantize(given, plan), plan)
        outs.append(jax.jit(jq.wrap(model, plan).apply)(prepared, TOKENS))
    # The same sums, of three layers of some 30 roundings each; codes of activations may flip by
    # one of 127 where they do not round alike.
    step = 2.0**-24 * 100 if activations is None else 1 / 127
    np.testing.assert_allclose(*outs, rtol=0, atol=step * float(jnp.abs(outs[0]).max()))


def test_the_decoder_on_codes_is_the_decoder_on_what_they_stand_for(variables):
    model = Decoder(scanned=True)
    plan, qvariables = _quantized(model, variables, SCHEMES["int8 channel"])
    meant = jax.tree.map(
        lambda x: jq.dequantize(x) if isinstance(x, jq.QArray) else x,
        {"params": qvariables["params"]},
        is_leaf=lambda x: isinstance(x, jq.QArray),
    )
    got = jax.jit(jq.wrap(model, plan).apply)(qvariables, TOKENS)
    want = jax.jit(model.apply)(meant, TOKENS)
    # Three layers of seven products and norms, each of sums of at most 32 products.
    np.testing.assert_allclose(
        got, want, rtol=0, atol=3 * 7 * 40 * 2.0**-24 * float(jnp.abs(want).max())
    )
