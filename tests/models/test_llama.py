"""Laws of the model: the cache changes nothing, nothing is looked up ahead, and paths are fixed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_configs import LLAMA

from jaxquant.models import Llama

CONFIG = LLAMA
KINDS = {
    "tied": CONFIG,
    "head": dataclasses.replace(CONFIG, tied=False),
    "bias": dataclasses.replace(CONFIG, qkv_bias=True),
    "scaled": dataclasses.replace(CONFIG, rope_factors=(1.0, 2.0, 4.0, 8.0) * 2),
    "one key head": dataclasses.replace(CONFIG, kv_heads=1),
}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, CONFIG.vocab_size, jnp.int32)


def _model(config, **kwargs):
    return Llama(config, rngs=nnx.Rngs(0), **kwargs)


@every_kind
def test_decoding_with_a_cache_is_the_full_forward(config):
    model = _model(config)
    whole = model(TOKENS)
    cache = model.init_cache(2, 16)
    prompt, cache = model.decode(TOKENS[:, :5], cache)
    parts = [prompt]
    for at in range(5, 12):
        logits, cache = model.decode(TOKENS[:, at : at + 1], cache)
        parts.append(logits)
    assert int(cache.position) == 12 and cache.length == 16
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)


@every_kind
def test_a_logit_depends_on_no_later_token(config):
    model = _model(config)
    changed = TOKENS.at[:, 7:].set(0)
    np.testing.assert_allclose(model(changed)[:, :7], model(TOKENS)[:, :7], atol=1e-6)
    assert jnp.abs(model(changed)[:, 7] - model(TOKENS)[:, 7]).max() > 1e-3


def test_the_last_logits_alone_are_the_last_of_all():
    model = _model(CONFIG)
    every, _ = model.decode(TOKENS, model.init_cache(2, 12))
    last, _ = model.decode(TOKENS, model.init_cache(2, 12), last_only=True)
    assert last.shape == (2, 1, CONFIG.vocab_size)
    np.testing.assert_allclose(last, every[:, -1:], atol=1e-6)


@every_kind
def test_a_prefilled_cache_is_one_that_was_decoded_into(config):
    model = _model(config)
    last, cache = model.prefill(TOKENS, 16)
    expected, other = model.decode(TOKENS, model.init_cache(2, 16), last_only=True)
    np.testing.assert_allclose(last, expected, atol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_prompt_that_the_cache_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="cannot hold a prompt of 12"):
        _model(CONFIG).prefill(TOKENS, 11)


def test_jit_is_eager():
    model = _model(CONFIG)
    jitted = jax.jit(lambda model, tokens: model(tokens))(model, TOKENS)
    np.testing.assert_allclose(jitted, model(TOKENS), atol=1e-5)


@every_kind
def test_logits_are_float32_whatever_the_model_computes_in(config):
    model = _model(config, dtype=jnp.bfloat16)
    logits = model(TOKENS)
    assert logits.dtype == jnp.float32
    assert model.init_cache(1, 4).keys[0].dtype == jnp.bfloat16
    # Each of the two layers rounds a few times, by 2^-9 of what it rounds.
    wide = _model(config)(TOKENS)
    assert float(jnp.abs(logits - wide).max()) < 16 * 2**-9 * float(jnp.abs(wide).max())


def test_the_paths_are_those_that_recipes_name():
    state = nnx.to_pure_dict(nnx.state(Llama.abstract(KINDS["head"])))
    paths = {"/".join(map(str, path)): leaf.shape for path, leaf in _flat(state)}
    layer = {
        "attention/q/kernel": (32, 64),
        "attention/k/kernel": (32, 32),
        "attention/v/kernel": (32, 32),
        "attention/o/kernel": (64, 32),
        "mlp/gate/kernel": (32, 64),
        "mlp/up/kernel": (32, 64),
        "mlp/down/kernel": (64, 32),
        "attention_norm/scale": (32,),
        "mlp_norm/scale": (32,),
    }
    assert paths == {
        "embed/embedding": (48, 32),
        "norm/scale": (32,),
        "head/kernel": (32, 48),
        **{f"layers/{i}/{name}": shape for i in range(2) for name, shape in layer.items()},
    }


def _flat(tree, at=()):
    for key, value in tree.items():
        yield from _flat(value, (*at, key)) if isinstance(value, dict) else [((*at, key), value)]


def test_an_abstract_model_holds_no_numbers():
    huge = dataclasses.replace(CONFIG, vocab_size=2**30, width=2**14)
    leaves = jax.tree.leaves(nnx.state(Llama.abstract(huge)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_norms_survive_the_outliers_of_real_models():
    model = _model(CONFIG, dtype=jnp.bfloat16)
    x = jnp.zeros((1, 1, 32), jnp.bfloat16).at[..., 0].set(20480.0)
    assert float(model.norm(x)[0, 0, 0]) == pytest.approx(32**0.5, rel=2**-8)
