"""`jaxquant compile`: fits or not, in named bytes, from shapes alone."""

import argparse
import json
import pathlib
import subprocess
import sys

import jax
import pytest
import tiny_llama
from jax.sharding import PartitionSpec as P

from jaxquant.cli._compile import prefill_of, spec_text

CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1024,
    "tie_word_embeddings": False,
}


@pytest.fixture
def config(tmp_path) -> pathlib.Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def _told(out: str) -> None:
    """The tables fit; the first line holds a path, which is as long as it is."""
    assert max(len(line.rstrip()) for line in out.splitlines()[1:]) <= 100


@pytest.mark.aot
def test_shapes_suffice(jaxquant, config, tmp_path):
    file = tmp_path / "c.json"
    ran = jaxquant(
        *("compile", config, "--recipe", "w4a16_g128", "--target", "v5e:2x4"),
        *("--batch", 4, "--length", 256, "--prefill", "2x128", "--json", file),
    )
    assert (ran.code, ran.err) == (0, "")
    _told(ran.out)
    for said in ("decode 4x1 after 256", "prefill 2x128", "decode fits", "prefill fits", "(kv, -)"):
        assert said in ran.out
    result = json.loads(file.read_text())
    assert (result["recipe"], result["target"], result["devices"]) == ("w4a16_g128", "v5e:2x4", 8)
    assert result["fits"] and result["mesh"] == {"kv": 8}
    decode, prefill = result["decode"], result["prefill"]
    assert (decode["rows"], decode["cache_length"]) == (4, 256)
    assert (prefill["rows"], prefill["new_tokens"]) == (2, 128)
    for step in (decode, prefill):
        named = sum(step["bytes"].values())
        assert named + step["bytes_of_padding"] == step["bytes_in_all"]
        assert abs(step["bytes_of_padding"]) <= 0.03 * step["bytes_in_all"]
        assert step["collectives_of_weights"] == 0 and step["collectives"]
        assert not any(each["weights"] for each in step["collectives"])
        schedule, least = step["program"]["schedule"], step["roofline"]["seconds"]
        assert schedule["over_roofline"] == schedule["seconds"] / least
    calls = decode["program"]["custom_calls"]
    assert calls["jaxquant_weight_product"] == 2 * 7


@pytest.mark.aot
def test_a_quantized_folder_has_its_recipe(jaxquant, quantized, tmp_path):
    common = ("--target", "v5e", "--length", 32, "--prefill", "none")
    ran = jaxquant("compile", quantized, *common, "--json", tmp_path / "c.json")
    assert (ran.code, ran.err) == (0, "")
    _told(ran.out)
    result = json.loads((tmp_path / "c.json").read_text())
    assert result["recipe"] == "w8a16" and result["prefill"] is None
    assert result["decode"]["bytes"]["codes"] == 2 * (4 * 64 * 64 + 3 * 64 * 128)
    again = jaxquant("compile", quantized, *common, "--recipe", "w8a16")
    assert again.code == 2 and "quantized already, by the recipe 'w8a16'" in again.err


@pytest.mark.aot
def test_a_gguf_file_is_compiled_for_a_gpu_as_it_is(jaxquant, tmp_path):
    model = tiny_llama.write_gguf(tmp_path / "model.gguf")
    ran = jaxquant("compile", model, "--target", "h100", "--length", 32, "--prefill", "none")
    assert (ran.code, ran.err) == (0, "")
    assert "in bfloat16" in ran.out and "decode fits" in ran.out and "scheduled" not in ran.out


@pytest.mark.aot
def test_what_does_not_fit_is_said_and_is_no_error(jaxquant, config, tmp_path):
    ran = jaxquant(
        *("compile", config, "--target", "v5e", "--length", 10**7, "--prefill", "none"),
        *("--json", tmp_path / "c.json"),
    )
    assert (ran.code, ran.err) == (0, "")
    assert "decode does not fit: arrays alone take" in ran.out
    result = json.loads((tmp_path / "c.json").read_text())
    assert not result["fits"] and result["decode"]["program"] is None
    assert result["decode"]["bytes_in_all"] == sum(result["decode"]["bytes"].values())


@pytest.mark.aot
def test_scales_that_cannot_be_cut_are_told(jaxquant, config, tmp_path):
    config.write_text(json.dumps({**CONFIG, "intermediate_size": 1536}))
    ran = jaxquant(
        *("compile", config, "--recipe", "w4a16_g128", "--target", "v5e:2x4"),
        *("--batch", 16, "--length", 64, "--prefill", "512"),
    )
    assert (ran.code, ran.err) == (0, "")
    assert "all scales of layers/*/mlp/down/kernel lie on every device" in ran.out
    assert "of weights between devices in each step" in ran.out


@pytest.mark.parametrize(
    ("changed", "arguments", "said"),
    [
        ({}, ("--target", "v9"), "'v9' is no target. Known are v4, v5e, v5p, v6e, 7x, h100"),
        ({}, ("--target", "v5e", "--recipe", "w4a16"), "There is no recipe named 'w4a16'"),
        ({"model_type": "qwen3"}, ("--target", "v5e"), "'qwen3'; llama, qwen2 can be read"),
    ],
)
def test_what_cannot_be_compiled_is_said_in_one_line(jaxquant, config, changed, arguments, said):
    config.write_text(json.dumps({**CONFIG, **changed}))
    ran = jaxquant("compile", config, *arguments)
    assert ran.code == 2 and ran.out == "" and ran.err.count("\n") == 1
    assert said in ran.err


def test_missing_compilers_are_named(jaxquant, config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = jaxquant("compile", config, "--target", "h100")
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert 'pip install "jaxquant[aot]"' in ran.err


def test_jax_that_is_set_to_run_elsewhere_is_an_error(jaxquant, config, monkeypatch):
    class Config:
        jax_platforms = "tpu"

    monkeypatch.setattr(jax, "config", Config())
    ran = jaxquant("compile", config, "--target", "v5e")
    assert ran.code == 2 and "set to run on 'tpu'" in ran.err


def test_prompts_are_read():
    assert prefill_of("512") == (1, 512)
    assert prefill_of("4x128") == (4, 128)
    assert prefill_of("none") == (1, 0)
    for text in ("", "0", "4x", "x4", "4x0", "1x2x3", "-4", "all"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not TOKENS"):
            prefill_of(text)


def test_specs_are_short():
    assert spec_text(P(None, ("kv", "rest"))) == "(-, kv+rest)"


@pytest.mark.aot
def test_the_environment_need_not_be_set(config, tmp_path):
    script = (
        "import os, sys; os.environ.pop('JAX_PLATFORMS', None); from jaxquant.cli import main; "
        f"sys.exit(main(['compile', {str(config)!r}, '--target', 'v5e', '--length', '16', "
        "'--prefill', 'none']))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "decode fits" in ran.stdout
