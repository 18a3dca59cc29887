"""A random Llama, a thousandth of the smallest real one, as files that the command line reads.

Unlike the models of `tests/models`, its sizes are multiples of 64, so that every named recipe fits
but those with wider groups, and it has a tokenizer: one token a byte.
"""

import json
import pathlib
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

VOCAB, WIDTH, HIDDEN, LAYERS, HEADS = 256, 64, 128, 2, 2
HEAD_DIM = WIDTH // HEADS

CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
MATRICES = {
    "self_attn.q_proj": ("attn_q", (WIDTH, WIDTH)),
    "self_attn.k_proj": ("attn_k", (WIDTH, WIDTH)),
    "self_attn.v_proj": ("attn_v", (WIDTH, WIDTH)),
    "self_attn.o_proj": ("attn_output", (WIDTH, WIDTH)),
    "mlp.gate_proj": ("ffn_gate", (HIDDEN, WIDTH)),
    "mlp.up_proj": ("ffn_up", (HIDDEN, WIDTH)),
    "mlp.down_proj": ("ffn_down", (WIDTH, HIDDEN)),
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def weights(seed: int = 0, vocab: int = VOCAB) -> dict[str, np.ndarray]:
    """Weights `[out, in]` under the names that Hugging Face gives them."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    arrays = {"model.embed_tokens.weight": matrix(vocab, WIDTH)}
    for layer in range(LAYERS):
        for name, (_, shape) in MATRICES.items():
            arrays[f"model.layers.{layer}.{name}.weight"] = matrix(*shape)
        for name in NORMS:
            arrays[f"model.layers.{layer}.{name}.weight"] = np.ones(WIDTH, np.float32)
    arrays["model.norm.weight"] = np.ones(WIDTH, np.float32)
    return arrays


def write_folder(
    folder: pathlib.Path,
    *,
    arrays: dict[str, np.ndarray] | None = None,
    config: dict[str, Any] | None = None,
    tokenizer: bool = True,
) -> pathlib.Path:
    """A Hugging Face folder; `arrays` and `config` override what is usual."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    vocab = (config or {}).get("vocab_size", VOCAB)
    held = {**weights(vocab=vocab), **(arrays or {})}
    safetensors.numpy.save_file(held, folder / "model.safetensors")
    if tokenizer:
        (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return folder


def byte_tokenizer() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def write_gguf(path: pathlib.Path) -> pathlib.Path:
    """A GGUF file of float32 tensors, without a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "rope.dimension_count": HEAD_DIM,
    }
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    arrays = weights()
    writer.add_tensor("token_embd.weight", arrays["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", arrays["model.norm.weight"])
    for layer in range(LAYERS):
        names = {**{name: short for name, (short, _) in MATRICES.items()}, **NORMS}
        for name, short in names.items():
            array = arrays[f"model.layers.{layer}.{name}.weight"]
            writer.add_tensor(f"blk.{layer}.{short}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokens(
    path: pathlib.Path, *, windows: int = 3, length: int = 16, highest: int = VOCAB
) -> pathlib.Path:
    """Random windows of ids below `highest`, as `--tokens` takes them."""
    rng = np.random.default_rng(1)
    np.savez(path, tokens=rng.integers(0, highest, (windows, length)).astype(np.int32))
    return path
