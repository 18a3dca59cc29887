"""Greedy completion is the argmax, token by token."""

import dataclasses

import jax.numpy as jnp
import pytest
from flax import nnx
from tiny_configs import LLAMA

from jaxquant.models import generate, Llama
from jaxquant.models._generate import _compiled_step

CONFIG = dataclasses.replace(LLAMA, tied=False)
PROMPT = [3, 1, 4, 1, 5]


class Opaque:
    """A wrapper that JAX cannot look into."""

    def __init__(self, model):
        self.model = model

    def prefill(self, tokens, length):
        return self.model.prefill(tokens, length)

    def decode(self, tokens, cache, *, last_only=False):
        return self.model.decode(tokens, cache, last_only=last_only)


@pytest.fixture
def model():
    return Llama(CONFIG, rngs=nnx.Rngs(0))


def _slowly(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        logits = model(jnp.asarray([ids], jnp.int32))
        ids.append(int(jnp.argmax(logits[0, -1])))
    return ids[len(prompt) :]


def test_each_token_is_the_likeliest_after_all_before_it(model):
    assert generate(model, PROMPT, 6) == _slowly(model, PROMPT, 6)


def test_an_opaque_wrapper_gives_the_same(model):
    assert generate(Opaque(model), PROMPT, 4) == generate(model, PROMPT, 4)


def test_a_stop_id_ends_it_and_is_not_returned(model):
    ids = generate(model, PROMPT, 6)
    assert generate(model, PROMPT, 6, stop_ids={ids[2]}) == ids[: ids.index(ids[2])]


def test_a_second_completion_compiles_nothing(model):
    generate(model, PROMPT, 6)
    before = _compiled_step._cache_size()
    generate(model, list(reversed(PROMPT)), 6)
    assert _compiled_step._cache_size() == before


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="prompt has no tokens"):
        generate(model, [], 3)


def test_no_new_tokens_are_refused(model):
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(model, PROMPT, 0)
