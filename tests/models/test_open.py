"""Any kind of model opens the same way, and what was saved is what is opened."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from flax import nnx

from jaxquant import recipes
from jaxquant.algorithms import quantize
from jaxquant.calibrate import calibrate
from jaxquant.checkpoint import CheckpointError, LazyArray, save
from jaxquant.intercept import plan as make_plan, wrap
from jaxquant.models import is_checkpoint, open_model, read_inventory, save_model

TOKENS = jnp.asarray([[1, 5, 2, 40, 7, 3]], jnp.int32)

# All that need no data, and of the others, which take seconds, the narrowest and one with state.
NAMES = [n for n, r in recipes.NAMED.items() if not any(x.algorithm or x.scaling for x in r.rules)]
# The tiny model is 64 wide.
NAMES.remove("w4a16_g128")
NAMES += ["hqq_w4_g64", "gptq_w2_asym_g64", "smoothquant_w8a8_static"]


def quantized(opened, recipe=recipes.W8A8):
    plan = make_plan(opened.model, nnx.state(opened.model), TOKENS, recipe=recipe)
    if plan.needs_calibration:
        return calibrate(opened.model, opened.variables, [(TOKENS,)], plan).qvariables, plan
    return quantize(opened.variables, plan), plan


@pytest.fixture
def opened(tmp_path):
    return open_model(tiny_llama.write_folder(tmp_path / "model"))


def test_foreign_models_open_unread_and_compute_alike(opened, tmp_path):
    gguf = open_model(tiny_llama.write_gguf(tmp_path / "model.gguf"))
    for each in (opened, gguf):
        assert each.plan is None
        assert all(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(each.variables))
        assert each.ready()(TOKENS).shape == (1, 6, tiny_llama.VOCAB)
    assert (opened.source, gguf.source) == ("F32 safetensors", "F32 GGUF")


@pytest.mark.parametrize("name", NAMES)
def test_what_was_saved_is_opened_with_the_same_logits(opened, tmp_path, name):
    qvariables, plan = quantized(opened, recipes.NAMED[name])
    call = jax.jit(lambda model, tokens: model(tokens))
    expected = call(wrap(opened.model, plan, qvariables), TOKENS)
    save_model(tmp_path / "q", opened, qvariables, plan)
    again = open_model(tmp_path / "q")
    assert again.plan == plan and again.config == opened.config
    assert again.source == opened.source
    same = call(wrap(again.model, plan, again.variables), TOKENS)
    np.testing.assert_array_equal(same, expected)
    # Laid out for speed, sums run in another order, which may move an activation to the next code:
    # by 1/127 of a token's largest in int8, by 1/16 of itself in e4m3, one among 64.
    off = np.linalg.norm(again.ready()(TOKENS) - expected)
    assert off <= (2e-2 if plan.sites[1].activations else 1e-5) * np.linalg.norm(expected)


def test_the_tokenizer_goes_along(opened, tmp_path):
    save_model(tmp_path / "q", opened, *quantized(opened))
    again = open_model(tmp_path / "q").tokenizer
    assert again.encode("Nineveh, that great city") == opened.tokenizer.encode(
        "Nineveh, that great city"
    )


def test_rope_factors_go_along(tmp_path):
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    folder = tiny_llama.write_folder(tmp_path / "model", config=scaling, tokenizer=False)
    opened = open_model(folder)
    assert opened.config.rope_factors is not None
    save_model(tmp_path / "q", opened, *quantized(opened))
    again = open_model(tmp_path / "q")
    assert again.config == opened.config
    with pytest.raises(CheckpointError, match="tokenizer"):
        again.tokenizer.encode("words")


def test_a_folder_without_a_model_of_ours_is_inspected_but_not_opened(opened, tmp_path):
    qvariables, plan = quantized(opened)
    save(tmp_path / "q", qvariables, plan)
    assert is_checkpoint(tmp_path / "q") and not is_checkpoint(tmp_path)
    inventory, source = read_inventory(tmp_path / "q")
    assert inventory.bytes == plan.bytes_after and "w8a8" in source
    with pytest.raises(CheckpointError, match="does not say that it holds a model of the llama"):
        open_model(tmp_path / "q")


def test_a_config_that_does_not_fit_is_named(opened, tmp_path):
    qvariables, plan = quantized(opened)
    config = {"vocab_size": 256, "width": 64}
    save(tmp_path / "q", qvariables, plan, metadata={"family": "llama", "config": config})
    with pytest.raises(CheckpointError, match="does not describe its model"):
        open_model(tmp_path / "q")


def test_a_config_of_other_sizes_is_named(opened, tmp_path):
    bigger = dataclasses.replace(opened.config, hidden=256)
    wrong = dataclasses.replace(opened, config=bigger)
    save_model(tmp_path / "q", wrong, *quantized(opened))
    with pytest.raises(CheckpointError, match="mlp/.*/kernel has shape"):
        open_model(tmp_path / "q")


def test_what_is_not_there_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_model(tmp_path / "none.gguf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(CheckpointError, match="manifest.json"):
        open_model(tmp_path / "folder")
