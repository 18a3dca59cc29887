"""What a model is, from each kind of file that says so; tensors are not needed."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import pytest
import tiny_llama

from jaxquant import recipes
from jaxquant.algorithms import quantize
from jaxquant.checkpoint import CheckpointError
from jaxquant.intercept import plan
from jaxquant.models import LlamaConfig, open_model, read_outline, save_model

SHAPES = pathlib.Path(__file__).parents[2] / "configs" / "shapes"
LLAMA_3_8B = json.loads((SHAPES / "llama_3_8b.json").read_text())


def _write(path, **changed):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**LLAMA_3_8B, **changed}))
    return path


def test_a_bare_config_is_enough(tmp_path):
    path = _write(tmp_path / "model" / "config.json")
    wanted = LlamaConfig(
        vocab_size=128256,
        width=4096,
        hidden=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        rope_theta=500000.0,
        norm_epsilon=1e-5,
        max_length=8192,
        tied=False,
    )
    for given in (path, path.parent):
        found = read_outline(given)
        assert found.config == wanted
        assert (found.plan, found.param_dtype) == (None, jnp.bfloat16)
        assert found.source == f"shapes of {path}"


def test_every_kind_of_file_says_the_same(tmp_path):
    folder = tiny_llama.write_folder(tmp_path / "folder")
    gguf = tiny_llama.write_gguf(tmp_path / "model.gguf")
    opened = open_model(folder)
    tokens = jnp.zeros((1, 8), jnp.int32)
    made = plan(opened.model, opened.variables, tokens, recipe=recipes.W8A16)
    save_model(tmp_path / "ours", opened, quantize(opened.variables, made), made)
    ours = read_outline(tmp_path / "ours")
    assert ours.plan == made and ours.param_dtype == jnp.float32
    configs = [read_outline(path).config for path in (folder, folder / "config.json", gguf)]
    assert configs[0] == configs[1] == ours.config == opened.config
    assert configs[2].width == configs[0].width and configs[2].layers == configs[0].layers


def test_where_weights_lie_beside_they_are_looked_at(tmp_path):
    folder = tiny_llama.write_folder(tmp_path / "folder", config={"head_dim": 16})
    assert read_outline(folder / "config.json").config.head_dim == 16
    with pytest.raises(CheckpointError, match="2 heads of 16 are not the 64 rows"):
        read_outline(folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "qwen3"}, "architecture 'qwen3'; llama, qwen2 can be read"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000.*at most 16384"),
        ({"head_dim": 10**8}, "head_dim is 100000000.*at most 16384"),
        ({"num_attention_heads": 0}, "heads is 0; a positive integer is wanted"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"quantization_config": {}}, "already quantized"),
    ],
)
def test_what_is_no_model_here_is_refused(tmp_path, changed, said):
    with pytest.raises(CheckpointError, match=said):
        read_outline(_write(tmp_path / "config.json", **changed))


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing at .*missing"):
        read_outline(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no config.json"):
        read_outline(tmp_path / "empty")


def test_the_large_one_differs_in_its_sizes():
    small, large = (read_outline(SHAPES / f"llama_3_{n}b.json").config for n in (8, 70))
    sizes = {"width": 8192, "hidden": 28672, "layers": 80, "heads": 64}
    assert dataclasses.replace(small, **sizes) == large


def test_of_a_hub_model_the_config_alone_is_fetched(tmp_path, monkeypatch):
    path = _write(tmp_path / "config.json")
    asked = []

    def fetch(hub_id, wanted):
        asked.append((hub_id, wanted))
        return tmp_path

    monkeypatch.setattr("jaxquant.models._outline.fetch_huggingface", fetch)
    assert read_outline("org/name").config == read_outline(path).config
    assert asked == [("org/name", ("config.json",))]
