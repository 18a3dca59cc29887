"""GPT-2 gives what transformers gives; `tests/golden/make_second_models.py` made the numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxquant.checkpoint import CheckpointError, LazyArray, materialize
from jaxquant.models import find_microformer, GPT2, GPT2Config, load_gpt2
from jaxquant.models._gpt2 import gpt2_origins

CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 13,
    "n_embd": 8,
    "n_inner": 12,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 9,
    "layer_norm_epsilon": 1e-3,
    "activation_function": "gelu_new",
}


@pytest.fixture
def tiny(golden):
    with np.load(golden / "tiny_gpt2.npz") as file:
        return dict(file)


def _write(folder, tiny, prefix="transformer.", extra=None, **config):
    weights = {
        name.removeprefix("weights/"): array
        for name, array in tiny.items()
        if name.startswith("weights/")
    }
    if not prefix:
        del weights["lm_head.weight"]
    weights = {name.replace("transformer.", prefix): array for name, array in weights.items()}
    safetensors.numpy.save_file({**weights, **(extra or {})}, folder / "model.safetensors")
    values = {key: value for key, value in {**CONFIG, **config}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_it_computes_what_transformers_computes(prefix, tiny, tmp_path):
    mask = {f"{prefix}h.0.attn.bias": np.ones((1, 1, 9, 9), np.float32)}
    loaded = load_gpt2(_write(tmp_path, tiny, prefix, mask))
    assert loaded.source == "F32 safetensors"
    assert all(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(loaded.variables))
    tokens = jnp.asarray(tiny["tokens"], jnp.int32)
    logits = loaded.model.apply(materialize(loaded.variables), tokens)
    # Sums of at most 12 products, some ten of them in a row: 100 roundings of the largest.
    largest = np.abs(tiny["logits"]).max()
    np.testing.assert_allclose(logits, tiny["logits"], atol=100 * 2.0**-24 * largest)


def test_the_hidden_width_is_four_times_the_width_by_default(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"has shape \[12, 8\], and .* want \[32, 8\]"):
        load_gpt2(_write(tmp_path, tiny, n_inner=...))


def test_more_tokens_than_positions_are_refused(tiny, tmp_path):
    loaded = load_gpt2(_write(tmp_path, tiny))
    with pytest.raises(ValueError, match="10 tokens were given and the model has positions for 9"):
        loaded.model.apply(materialize(loaded.variables), jnp.zeros((1, 10), jnp.int32))


def test_the_map_names_each_variable_once():
    config = GPT2Config(
        vocab_size=13, width=8, hidden=12, layers=3, heads=2, max_length=9, norm_epsilon=1e-3
    )
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(GPT2(config).init, jax.random.key(0), tokens)
    paths = {tuple(part.key for part in path) for path, _ in jax.tree.leaves_with_path(shapes)}
    origins = gpt2_origins(config)
    assert origins.keys() == paths
    assert len({origin.name for origin in origins.values()}) == len(paths)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "type 'bert', and 'gpt2' was wanted"),
        ({"activation_function": "relu"}, "'relu', which is not implemented; wanted 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "is True, which is not implemented"),
        ({"scale_attn_weights": False}, "is False, which is not implemented"),
        ({"tie_word_embeddings": False}, "is False, which is not implemented"),
        ({"n_head": 3}, "3 heads for a width of 8"),
        ({"n_layer": 1}, "12 tensors that this architecture does not have"),
        ({"n_layer": 3}, "no tensor 'transformer.h.2."),
        ({"n_positions": 10}, r"shape \[9, 8\].*want \[10, 8\]"),
    ],
)
def test_another_model_is_refused(config, message, tiny, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_gpt2(_write(tmp_path, tiny, **config))


@pytest.mark.registry
def test_microformer_gives_the_logits_that_transformers_gives(golden):
    loaded = load_gpt2(find_microformer())
    assert loaded.source == "float32 PyTorch file"
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.variables)) == 8_924_928
    with np.load(golden / "second_models.npz") as wanted:
        tokens = jnp.asarray(wanted["microformer_tokens"], jnp.int32)
        logits = jax.jit(loaded.model.apply)(materialize(loaded.variables), tokens)
        # Found: 1.5e-5, of logits of up to 18.
        found = logits[0, np.array([0, 1, 31, 63]), :16]
        np.testing.assert_allclose(found, wanted["microformer_logits"], atol=1e-4)


def test_narrow_floats_are_computed_in_and_logits_are_wide(tiny, tmp_path):
    loaded = load_gpt2(_write(tmp_path, tiny), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    logits = loaded.model.apply(
        materialize(loaded.variables), jnp.asarray(tiny["tokens"], jnp.int32)
    )
    assert logits.dtype == jnp.float32
    # Two layers of some twenty roundings of 2^-9 each.
    largest = np.abs(tiny["logits"]).max()
    np.testing.assert_allclose(logits, tiny["logits"], atol=40 * 2.0**-9 * largest)
