"""Sides are the model they say they are, and what is timed computes what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import recipes
from jaxquant.cli._sides import (
    CONTEXT,
    Decoding,
    float_side,
    NEW_TOKENS,
    prefill,
    quantized_side,
    USUAL,
    wanted_recipes,
)
from jaxquant.models import open_model


@pytest.fixture
def opened(model):
    return open_model(model)


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation by the whole model at each step, without a cache."""
    call = jax.jit(lambda model, ids: model(ids))
    ids, end = np.zeros((1, len(prompt) + count), np.int32), len(prompt)
    ids[0, :end] = prompt
    for at in range(end, end + count):
        # What stands behind a position does not reach it.
        ids[0, at] = np.argmax(call(model, jnp.asarray(ids))[0, at - 1])
    return ids[0, end:].tolist()


@pytest.mark.parametrize("recipe", [None, recipes.W8A16])
def test_a_completion_is_the_greedy_one(opened, recipe):
    side = float_side(opened)
    if recipe is not None:
        side = quantized_side(opened, side, recipe)
    prompt = opened.tokenizer.encode("In the beginning")
    expected = greedy(side.model, prompt, NEW_TOKENS)
    decoding = Decoding(side.model)
    decoding()
    # Whatever was decoded before, and however often.
    assert decoding.complete(prompt, None) == expected
    assert decoding.complete(prompt, None) == expected
    stop = expected[3]
    assert decoding.complete(prompt, stop) == expected[: expected.index(stop)]


def test_a_completion_ends_with_the_cache(opened):
    decoding = Decoding(float_side(opened).model, 4)
    assert len(decoding.complete([1] * (CONTEXT + 2), None)) == 3
    assert decoding.complete([1] * (CONTEXT + 9), None) == []


def test_prefill_gives_the_logits_after_the_prompt(opened):
    side = float_side(opened)
    logits, cache = prefill(side.model, 12)()
    expected = side.model(jnp.zeros((1, 12), jnp.int32))[:, -1:]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert int(cache.position) == 12


def test_recipes_are_all_the_named_ones_or_those_asked_for():
    assert [recipe.name for recipe in wanted_recipes(None)] == [r.name for r in USUAL]
    assert wanted_recipes(["fp8"]) == [recipes.FP8]
    with pytest.raises(ValueError, match="'fp8' is taken"):
        wanted_recipes(["fp8", "fp8"])


def test_sizes_are_those_of_the_plan(opened):
    plain = float_side(opened)
    side = quantized_side(opened, plain, recipes.W8A16)
    assert side.plan is not None
    assert (plain.inventory.bytes, side.inventory.bytes) == (
        side.plan.bytes_before,
        side.plan.bytes_after,
    )
