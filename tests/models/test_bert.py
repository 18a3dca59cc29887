"""BERT gives what transformers gives; `tests/golden/make_second_models.py` made the numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from jaxquant.checkpoint import CheckpointError, LazyArray, materialize
from jaxquant.models import Bert, BertConfig, find_minilm, load_bert
from jaxquant.models._bert import bert_origins

CONFIG = {
    "model_type": "bert",
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-3,
    "hidden_act": "gelu",
}
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "d", "e", "f", "g", "h", "i")
# Sums of at most 12 products of numbers of order 1, twice, normed in between: some 100 roundings.
TOLERANCE = 100 * 2.0**-24


@pytest.fixture
def tiny(golden):
    with np.load(golden / "tiny_bert.npz") as file:
        return dict(file)


def _write(folder, tiny, prefix="", extra=None, **config):
    weights = {
        prefix + name.removeprefix("weights/"): array
        for name, array in tiny.items()
        if name.startswith("weights/")
    }
    safetensors.numpy.save_file({**weights, **(extra or {})}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    vocab = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    # As all-MiniLM's file has it, which would cut and pad whatever is asked for.
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=3)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_it_computes_what_transformers_computes(prefix, tiny, tmp_path):
    extra = {"cls.predictions.bias": np.zeros(13, np.float32)} if prefix else None
    loaded = load_bert(_write(tmp_path, tiny, prefix, extra))
    assert loaded.source == "F32 safetensors"
    assert all(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(loaded.variables))
    variables = materialize(loaded.variables)
    tokens, types = (jnp.asarray(tiny[name], jnp.int32) for name in ("tokens", "types"))
    mask = jnp.asarray(tiny["mask"], bool)
    features = loaded.model.apply(variables, tokens, mask, types)
    # Features at padding are of no use to anyone, and transformers masks otherwise there.
    np.testing.assert_allclose(
        features[mask], tiny["features"][np.asarray(mask)], rtol=TOLERANCE, atol=TOLERANCE
    )
    embedded = loaded.model.apply(variables, tokens, mask, method="embed_sentences")
    np.testing.assert_allclose(embedded, tiny["embeddings"], rtol=TOLERANCE, atol=TOLERANCE)


def test_padding_does_not_count(tiny, tmp_path):
    loaded = load_bert(_write(tmp_path, tiny))
    variables = materialize(loaded.variables)

    def embed(texts, length):
        tokens, mask = loaded.tokenize(texts, length)
        return loaded.model.apply(variables, tokens, mask, method="embed_sentences")

    short = embed(["a b c"], 5)
    np.testing.assert_allclose(embed(["a b c", "d"], 9)[:1], short, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(jnp.linalg.norm(short, axis=-1), 1, rtol=TOLERANCE)


def test_texts_are_cut_and_padded_as_asked(tiny, tmp_path):
    loaded = load_bert(_write(tmp_path, tiny))
    tokens, mask = loaded.tokenize(["a b c d e", "f", "zebra"], 5)
    np.testing.assert_array_equal(tokens, [[1, 4, 5, 6, 2], [1, 9, 2, 0, 0], [1, 3, 2, 0, 0]])
    np.testing.assert_array_equal(mask, tokens != 0)
    assert (tokens.dtype, mask.dtype) == (np.int32, np.bool_)
    with pytest.raises(ValueError, match="length is 1"):
        loaded.tokenize(["a"], 1)
    variables = materialize(loaded.variables)
    tokens, mask = loaded.tokenize(["a"], 10)
    with pytest.raises(ValueError, match="10 tokens were given and the model has positions for 9"):
        loaded.model.apply(variables, tokens, mask)


def test_the_map_names_each_variable_once():
    config = BertConfig(
        vocab_size=13, width=8, hidden=12, layers=3, heads=2, max_length=9, token_types=2,
        norm_epsilon=1e-3,
    )  # fmt: skip
    shapes = jax.eval_shape(
        Bert(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    )
    paths = {tuple(part.key for part in path) for path, _ in jax.tree.leaves_with_path(shapes)}
    origins = bert_origins(config)
    assert origins.keys() == paths
    assert len({origin.name for origin in origins.values()}) == len(paths)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "roberta"}, "type 'roberta', and 'bert' was wanted"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', which is not implemented"),
        ({"position_embedding_type": "relative_key"}, "not implemented; wanted 'absolute'"),
        ({"is_decoder": True}, "is_decoder is True, which is not implemented"),
        ({"num_attention_heads": 3}, "3 heads for a width of 8"),
        ({"num_hidden_layers": 1}, "16 tensors that this architecture does not have"),
        ({"num_hidden_layers": 3}, "no tensor 'encoder.layer.2."),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": 14}, r"shape \[13, 8\].*want \[14, 8\]"),
    ],
)
def test_another_model_is_refused(config, message, tiny, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_bert(_write(tmp_path, tiny, **config))


@pytest.mark.registry
def test_minilm_embeds_as_transformers_does(golden):
    texts = [
        "The cat sat on the mat.",
        "In the beginning God created the heaven and the earth.",
        "Quantization stores numbers in fewer bits!",
    ]
    loaded = load_bert(find_minilm())
    # 22,713,216 in all (the package's table), less a pooler of 384 * 384 + 384 that is not used.
    sizes = [leaf.size for leaf in jax.tree.leaves(loaded.variables)]
    assert sum(sizes) == 22_713_216 - 147_840
    with np.load(golden / "second_models.npz") as wanted:
        tokens, mask = loaded.tokenize(texts, 16)
        np.testing.assert_array_equal(tokens, wanted["minilm_tokens"])
        embedded = jax.jit(loaded.model.apply, static_argnames="method")(
            materialize(loaded.variables), tokens, mask, method="embed_sentences"
        )
        # Found: 1.5e-7, of numbers of about 0.05.
        np.testing.assert_allclose(embedded[:, :16], wanted["minilm_embeddings"], atol=1e-6)


def test_narrow_floats_are_computed_in_and_embeddings_are_wide(tiny, tmp_path):
    loaded = load_bert(_write(tmp_path, tiny), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    tokens, mask = jnp.asarray(tiny["tokens"], jnp.int32), jnp.asarray(tiny["mask"], bool)
    variables = materialize(loaded.variables)
    assert loaded.model.apply(variables, tokens, mask).dtype == jnp.bfloat16
    embedded = loaded.model.apply(variables, tokens, mask, method="embed_sentences")
    assert embedded.dtype == jnp.float32
    # Two layers of some ten roundings of 2^-9 each, of a vector of length 1.
    np.testing.assert_allclose(embedded, tiny["embeddings"], atol=20 * 2.0**-9)
