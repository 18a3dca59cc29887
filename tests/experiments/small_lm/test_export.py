import jax.numpy as jnp
import numpy as np
import pytest
from small_lm.export import export, tensors_of
from small_lm.model import config_of, make_model
from small_lm.settings import Model, Text
from small_lm.text import make_corpus

from jaxquant.cli._demo import excerpt
from jaxquant.models import open_model

ROW = {"parameters": 1, "tokens": 2, "steps": 3, "nll": 4.0, "bits_per_byte": 5.0}


def small():
    corpus = make_corpus(excerpt(), Text(vocabulary=300, length=16, held_out=["Jonah"], windows=2))
    sizes = Model(width=64, hidden=96, layers=2, heads=2, kv_heads=1, head_dim=32)
    return make_model(config_of(sizes, 300, 16), sub_norms=False, seed=0), corpus


def test_the_folder_is_opened_as_the_model_that_it_is(tmp_path):
    model, corpus = small()
    export(model, corpus, ROW, tmp_path)
    opened = open_model(tmp_path)
    assert opened.config == model.config
    assert opened.source == "F16 safetensors"
    tokens = jnp.asarray(corpus.held_out)
    # float16 has 11 bits, and a few hundred products of logits of order 1 are summed.
    np.testing.assert_allclose(opened.ready()(tokens), model(tokens), atol=0.02)
    assert opened.tokenizer.encode("Jonah fled") == corpus.tokenizer.encode("Jonah fled")
    assert opened.tokenizer.eos_id == corpus.tokenizer.eos_id
    card = (tmp_path / "README.md").read_text()
    assert "{" not in card and corpus.sha256 in card and "Apache-2.0" in card


def test_weights_that_float16_does_not_hold_are_refused():
    model, _ = small()
    model.norm.scale[...] = jnp.full((64,), 1e5, jnp.float32)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds values that float16"):
        with np.errstate(over="ignore"):
            tensors_of(model)
