"""Configs of foreign files: defaults, and linear scaling. What is refused is in test_load.py."""

import json

from jaxquant.checkpoint import open_gguf, open_huggingface
from jaxquant.models._foreign_config import config_from_gguf, config_from_huggingface


def test_both_kinds_of_file_say_the_same(tiny, tmp_path):
    one = config_from_gguf(open_gguf(tiny.write_gguf(tmp_path / "tiny.gguf")))
    other = config_from_huggingface(open_huggingface(tiny.write_huggingface(tmp_path / "folder")))
    # GGUF holds the epsilon in float32.
    assert abs(one.norm_epsilon - other.norm_epsilon) < 1e-12
    fields = (vars(config) | {"norm_epsilon": None} for config in (one, other))
    assert next(fields) == next(fields)
    assert one.qkv_bias == tiny.bias and one.tied == tiny.tied


def test_what_a_file_leaves_out_is_what_its_writer_meant(tiny_llama, tmp_path):
    folder = tiny_llama.write_huggingface(tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    for key in ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "max_position_embeddings"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    read = config_from_huggingface(open_huggingface(folder))
    # transformers' LlamaConfig has these defaults.
    assert (read.norm_epsilon, read.rope_theta, read.tied) == (1e-6, 10000.0, False)
    assert read.max_length == 2048


def test_linear_scaling_slows_every_pair_alike(tiny_llama, tmp_path):
    scaling = {"rope_scaling": {"type": "linear", "factor": 4}}
    folder = tiny_llama.write_huggingface(tmp_path / "folder", config=scaling)
    assert config_from_huggingface(open_huggingface(folder)).rope_factors == (4.0,) * 8
