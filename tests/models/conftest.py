"""One tiny random model, written as a GGUF file and as a Hugging Face folder.

Nothing here may import jaxquant: see tests/conftest.py.
"""

import dataclasses
import json
import pathlib

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

VOCAB, WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 48, 32, 64, 2, 4, 2, 16


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k (`LlamaModel.permute`)."""
    split = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny:
    """Weights under Hugging Face names, [out, in]. The head's size is not width / heads."""

    arrays: dict[str, np.ndarray]
    tied: bool
    bias: bool

    @property
    def model_type(self) -> str:
        return "qwen2" if self.bias else "llama"

    def config(self) -> dict:
        return {
            "model_type": self.model_type,
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64,
            "tie_word_embeddings": self.tied,
        }

    def write_huggingface(
        self, folder: pathlib.Path, *, dtype=np.float32, shards: int = 1, config=None
    ) -> pathlib.Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**self.config(), **(config or {})}))
        arrays = {name: array.astype(dtype) for name, array in self.arrays.items()}
        if shards == 1:
            safetensors.numpy.save_file(arrays, folder / "model.safetensors")
            return folder
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {name: arrays[name] for name in list(arrays)[shard::shards]}
            safetensors.numpy.save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    def write_gguf(self, path: pathlib.Path, *, metadata=None, arrays=None) -> pathlib.Path:
        """`metadata` overrides integers (`None` leaves one out); `arrays` overrides tensors."""
        arch = self.model_type
        writer = gguf.GGUFWriter(path, arch)
        integers = {
            "block_count": LAYERS,
            "context_length": 64,
            "embedding_length": WIDTH,
            "feed_forward_length": HIDDEN,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM,
            "rope.dimension_count": HEAD_DIM,
        } | (metadata or {})
        for key, value in integers.items():
            if value is not None:
                writer.add_uint32(f"{arch}.{key}", value)
        writer.add_float32(f"{arch}.rope.freq_base", 10000.0)
        writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
        for name, array in (self.gguf_arrays() | (arrays or {})).items():
            if array is not None:
                writer.add_tensor(name, np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def gguf_arrays(self) -> dict[str, np.ndarray]:
        parts = {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
        }
        renamed = {}
        for name, array in self.arrays.items():
            stem, _, kind = name.rpartition(".")
            if stem.startswith("model.layers."):
                _, _, layer, part = stem.split(".", 3)
                heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
                if heads is not None and not self.bias:
                    array = interleave(array, heads)
                renamed[f"blk.{layer}.{parts[part]}.{kind}"] = array
            else:
                renamed[f"{parts[stem]}.{kind}"] = array
        return renamed


def make_tiny(*, tied: bool = True, bias: bool = False) -> Tiny:
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        # Values of bfloat16, so that every float dtype of the files holds them exactly.
        values = rng.normal(size=(rows, columns)) / np.sqrt(columns)
        return values.astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float32)

    arrays = {"model.embed_tokens.weight": matrix(VOCAB, WIDTH)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"{at}.{norm}.weight"] = 1 + matrix(1, WIDTH)[0].round(2)
        for part, out in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            arrays[f"{at}.self_attn.{part}_proj.weight"] = matrix(out * HEAD_DIM, WIDTH)
            if bias:
                arrays[f"{at}.self_attn.{part}_proj.bias"] = matrix(1, out * HEAD_DIM)[0]
        arrays[f"{at}.self_attn.o_proj.weight"] = matrix(WIDTH, HEADS * HEAD_DIM)
        arrays[f"{at}.mlp.gate_proj.weight"] = matrix(HIDDEN, WIDTH)
        arrays[f"{at}.mlp.up_proj.weight"] = matrix(HIDDEN, WIDTH)
        arrays[f"{at}.mlp.down_proj.weight"] = matrix(WIDTH, HIDDEN)
    arrays["model.norm.weight"] = 1 + matrix(1, WIDTH)[0]
    if not tied:
        arrays["lm_head.weight"] = matrix(VOCAB, WIDTH)
    for name, array in arrays.items():
        if array.ndim == 1:
            arrays[name] = array.astype(ml_dtypes.bfloat16).astype(np.float32)
    return Tiny(arrays=arrays, tied=tied, bias=bias)


@pytest.fixture(params=["tied", "head", "bias"])
def tiny(request) -> Tiny:
    """Each kind of model: llama with tied and separate head, qwen2."""
    return make_tiny(tied=request.param != "head", bias=request.param == "bias")


@pytest.fixture
def tiny_llama() -> Tiny:
    return make_tiny()


@pytest.fixture
def golden() -> pathlib.Path:
    """The folder of files that other libraries wrote."""
    return pathlib.Path(__file__).parents[1] / "golden"
