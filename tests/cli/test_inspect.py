"""`jaxquant inspect`: true to the byte, for each kind of model, within 100 columns."""

import json

import gguf
import numpy as np
import pytest
import safetensors.numpy
import tiny_llama

from jaxquant.checkpoint import load, read_manifest
from jaxquant.cli._inspect import size_text
from jaxquant.intercept._variables import parameters, unstamped
from jaxquant.qarray import bytes_held


def inspected(jaxquant, path, tmp_path) -> dict:
    ran = jaxquant("inspect", path, "--json", tmp_path / "i.json")
    assert ran.code == 0 and ran.err == ""
    assert max(len(line.rstrip()) for line in ran.out.splitlines()[1:-2]) <= 100
    result = json.loads((tmp_path / "i.json").read_text())
    tensors = result["tensors"]
    fixed = {"path", "shape", "scheme", "bits_per_value", "bytes"}
    assert set(tensors[0]) == fixed | {"rule", "reason", "sqnr_db"}
    assert result["bytes"] == sum(tensor["bytes"] for tensor in tensors)
    assert result["parameters"] == sum(int(np.prod(tensor["shape"])) for tensor in tensors)
    assert result["bits_per_weight"] == 8 * result["bytes"] / result["parameters"]
    return result


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16_g64_e8"])
def test_a_folder_of_ours_is_what_is_loaded_from_it(jaxquant, model, tmp_path, recipe):
    out = tmp_path / "q"
    assert jaxquant("quantize", model, out, "--recipe", recipe).code == 0
    result = inspected(jaxquant, out, tmp_path)
    variables, plan = load(out)
    held = {path: bytes_held(x) for path, x in parameters(unstamped(variables)[0]).items()}
    assert {tensor["path"]: tensor["bytes"] for tensor in result["tensors"]} == held
    assert result["bytes"] == plan.bytes_after == read_manifest(out).bytes
    by_path = {tensor["path"]: tensor for tensor in result["tensors"]}
    assert by_path["norm/scale"]["scheme"] == "float32"
    expected = {"w8a16": ("int8 channel", 8 + 32 / 64), "w4a16_g64_e8": ("int4 g64", 4.25)}
    query = by_path["layers/0/attention/q/kernel"]
    assert (query["scheme"], query["bits_per_value"]) == expected[recipe]


def test_a_folder_of_ours_tells_noise_rules_and_reasons(jaxquant, model, tmp_path):
    out, file = tmp_path / "q", tmp_path / "q.json"
    made = jaxquant("quantize", model, out, "--recipe", "w8a16", "--json", file)
    result = inspected(jaxquant, out, tmp_path)
    by_path = {tensor["path"]: tensor for tensor in result["tensors"]}
    for site in json.loads(file.read_text())["sites"]:
        tensor = by_path[site["path"]]
        assert (tensor["rule"], tensor["reason"]) == (site["rule"], site["reason"])
        assert tensor["sqnr_db"] == site["sqnr_db"]
        assert tensor["bits_per_value"] == site["bits_per_value"]
    assert by_path["layers/0/mlp/up/kernel"]["sqnr_db"] > 35
    assert by_path["embed/embedding"]["reason"].startswith("left by the rule")
    assert by_path["norm/scale"]["reason"].startswith("no site; read by")
    # The same table, with the errors that were measured when it was made.
    said = jaxquant("inspect", out).out
    table = [line for line in made.out.splitlines() if "kernel#dot" in line]
    assert table and "SQNR dB" in made.out and all(line in said for line in table)


def test_a_gguf_file_is_what_it_stores(jaxquant, tmp_path):
    path = tiny_llama.write_gguf(tmp_path / "model.gguf")
    result = inspected(jaxquant, path, tmp_path)
    reader = gguf.GGUFReader(path)
    assert result["bytes"] == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert {tensor["scheme"] for tensor in result["tensors"]} == {"F32"}


def test_a_hugging_face_folder_is_what_it_stores(jaxquant, model, tmp_path):
    halves = {name: array.astype(np.float16) for name, array in tiny_llama.weights().items()}
    safetensors.numpy.save_file(halves, model / "model.safetensors")
    result = inspected(jaxquant, model, tmp_path)
    assert result["bytes"] == sum(array.nbytes for array in halves.values())
    assert result["bits_per_weight"] == 16


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 B"), (1000, "1.0 kB"), (85_050_624, "85.1 MB"), (5e9, "5.00 GB")],
)
def test_sizes_have_three_digits_before_the_point(count, text):
    assert size_text(count) == text


@pytest.mark.registry
def test_a_real_gguf(jaxquant, smollm2_gguf, tmp_path):
    result = inspected(jaxquant, smollm2_gguf, tmp_path)
    assert (result["parameters"], result["bytes"]) == (134_515_008, 96_576_768)
