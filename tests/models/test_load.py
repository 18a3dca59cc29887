"""Both kinds of file give the same model, nothing is read early, and bad files are refused."""

import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant.checkpoint import CheckpointError, LazyArray
from jaxquant.models import bind, load_model

TOKENS = jnp.asarray([[1, 5, 2, 40, 7, 3]], jnp.int32)


def test_gguf_and_hugging_face_give_the_same_logits(tiny, tmp_path):
    one = load_model(tiny.write_gguf(tmp_path / "tiny.gguf"))
    other = load_model(tiny.write_huggingface(tmp_path / "folder"))
    assert one.source == "F32 GGUF" and other.source == "F32 safetensors"
    # float32(1e-5) in the GGUF and the double 1e-5 in the JSON are the same float32.
    np.testing.assert_array_equal(one.bind()(TOKENS), other.bind()(TOKENS))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_float_and_sharding_gives_the_same_model(tiny, tmp_path, dtype, shards):
    plain = load_model(tiny.write_huggingface(tmp_path / "plain"))
    other = load_model(tiny.write_huggingface(tmp_path / "other", dtype=dtype, shards=shards))
    for a, b in zip(*(jax.tree.leaves(x.variables) for x in (plain, other)), strict=True):
        np.testing.assert_allclose(a.read(), b.read(), rtol=2**-8)
        assert b.dtype == np.float32


def test_variables_are_lazy_and_have_the_shapes_of_the_model(tiny_llama, tmp_path):
    loaded = load_model(tiny_llama.write_gguf(tmp_path / "tiny.gguf"), param_dtype=jnp.bfloat16)
    abstract = jax.tree.leaves(loaded.model, is_leaf=lambda x: hasattr(x, "shape"))
    leaves = jax.tree.leaves(loaded.variables)
    assert all(isinstance(leaf, LazyArray) for leaf in leaves)
    assert [(x.shape, x.dtype) for x in leaves] == [(x.shape, x.dtype) for x in abstract]
    model = bind(loaded.model, loaded.variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}


def test_nothing_large_is_in_memory_before_it_is_asked_for(tiny_llama, tmp_path):
    big = np.zeros((1 << 20, 32), np.float32)
    path = tiny_llama.write_gguf(tmp_path / "big.gguf", arrays={"token_embd.weight": big})
    load_model(path)
    tracemalloc.start()
    loaded = load_model(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < big.nbytes / 10
    assert loaded.config.vocab_size == 1 << 20


NOT_A_NUMBER = np.full((32, 64), np.nan, np.float32)
INFINITE = np.concatenate([np.zeros(31), [np.inf]]).astype(np.float32)


@pytest.mark.parametrize(
    ("metadata", "arrays", "message"),
    [
        ({}, {"blk.1.ffn_up.weight": None}, "no tensor 'blk.1.ffn_up.weight'"),
        ({}, {"blk.0.ffn_up.weight": np.zeros((63, 32), np.float32)}, r"shape \[63, 32\].*\[64, 3"),
        ({}, {"blk.0.attn_q.weight": np.zeros((8, 32), np.float32)}, "4 heads of 16 are not the 8"),
        ({}, {"blk.0.attn_rot.weight": np.zeros((2, 2), np.float32)}, "1 tensors that this arch"),
        (
            {},
            {"blk.0.attn_output.weight": NOT_A_NUMBER},
            r"attn_output.weight' holds nan at \[0, 0",
        ),
        ({}, {"output_norm.weight": INFINITE}, r"'output_norm.weight' holds inf at \[31\]"),
        ({"block_count": None}, {}, "has no llama.block_count"),
        ({"block_count": 2**32 - 1}, {}, "block_count is 4294967295, and the file has 20"),
        ({"block_count": 0}, {}, "block_count is 0"),
        ({"attention.head_count": 0}, {}, "0 heads of 16"),
        ({"attention.head_count_kv": 3}, {}, "4 heads and 3 kv_heads"),
        ({"feed_forward_length": 2**32 - 1}, {}, "hidden is 4294967295"),
        ({"rope.dimension_count": 8}, {}, "rope.dimension_count is 8, which is not implemented"),
        ({"expert_count": 8}, {}, "expert_count is 8, which is not implemented"),
    ],
)
def test_a_bad_gguf_is_one_clear_error(tiny_llama, tmp_path, metadata, arrays, message):
    path = tiny_llama.write_gguf(tmp_path / "bad.gguf", metadata=metadata, arrays=arrays)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path).bind()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba'; llama, qwen2 can be read"),
        ({"model_type": 7}, "model_type is '7', and a str was wanted"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": 64}, r"shape \[48, 32\].*want \[48, 64\]"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers is 1000"),
        ({"rope_theta": 10**400}, "rope_theta is too large"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not implemented; default, linear and"),
        ({"rope_scaling": 3}, "rope settings are 3"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_factors must be positive"),
        ({"attention_bias": True}, "attention_bias is True, which is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not implemented"),
        ({"quantization_config": {}}, "already quantized"),
    ],
)
def test_a_bad_config_is_one_clear_error(tiny_llama, tmp_path, config, message):
    folder = tiny_llama.write_huggingface(tmp_path / "bad", config=config)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder).bind()
    assert "\n" not in str(caught.value)


def test_an_unknown_gguf_architecture_lists_the_known_ones(tiny_llama, tmp_path):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(
        path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0llamb", 1)
    )
    with pytest.raises(CheckpointError, match="architecture 'llamb'; llama, qwen2 can be read"):
        load_model(path)


def test_a_path_to_nothing_is_not_looked_up_on_the_hub(tmp_path):
    for path in (tmp_path / "none", "none.gguf", "./none/there"):
        with pytest.raises(FileNotFoundError, match="There is nothing at"):
            load_model(path)


def test_weights_can_be_had_without_a_tokenizer(tiny_llama, tmp_path):
    loaded = load_model(tiny_llama.write_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        _ = loaded.tokenizer


def test_an_integer_param_dtype_is_refused(tiny_llama, tmp_path):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match="param_dtype is int8"):
        load_model(path, param_dtype=jnp.int8)


def test_llama3_scaling_is_the_same_from_both_kinds_of_file(tiny_llama, tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = tiny_llama.write_huggingface(tmp_path / "f", config={"rope_scaling": scaling})
    factors = load_model(folder).config.rope_factors
    assert factors is not None and factors[0] < factors[-1] == 8.0
    stored = np.asarray(factors, np.float32)
    path = tiny_llama.write_gguf(tmp_path / "t.gguf", arrays={"rope_freqs.weight": stored})
    np.testing.assert_allclose(load_model(path).config.rope_factors, factors, rtol=1e-7)
    newer = {"rope_scaling": None, "rope_parameters": {**scaling, "rope_theta": 10000.0}}
    folder = tiny_llama.write_huggingface(tmp_path / "g", config=newer)
    assert load_model(folder).config.rope_factors == factors
