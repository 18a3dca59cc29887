"""`jaxquant quantize`: the folder, the account of it, and the memory it takes."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_llama

from jaxquant.checkpoint import load
from jaxquant.cli._quantize import peak_rss_bytes
from jaxquant.models import open_model


def size_of(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16_g64", "w4a16_g64_e8", "w8a8", "fp8"])
def test_every_named_recipe_makes_a_folder_that_opens(jaxquant, model, tmp_path, recipe):
    ran = jaxquant("quantize", model, tmp_path / "q", "--recipe", recipe)
    assert ran.code == 0 and ran.err == ""
    assert recipe in ran.out and "bits a weight" in ran.out
    opened = open_model(tmp_path / "q")
    assert opened.plan is not None and opened.plan.recipe == recipe
    logits = opened.ready()(np.zeros((1, 4), np.int32))
    assert logits.shape == (1, 4, tiny_llama.VOCAB)
    assert opened.tokenizer.decode(opened.tokenizer.encode("a word")) == "a word"


def test_json_has_every_site_and_what_inspect_says(jaxquant, model, tmp_path):
    out, file = tmp_path / "q", tmp_path / "q.json"
    assert jaxquant("quantize", model, out, "--recipe", "w8a8", "--json", file).code == 0
    result = json.loads(file.read_text())
    assert jaxquant("inspect", out, "--json", tmp_path / "i.json").code == 0
    for key, value in json.loads((tmp_path / "i.json").read_text()).items():
        if key != "tensors":
            assert result[key] == value
    assert result["seconds"] > 0 and result["peak_rss_bytes"] > 1e7
    sites = {site["site"]: site for site in result["sites"]}
    # Seven matrices a layer, and the embedding's two uses.
    assert len(sites) == 7 * tiny_llama.LAYERS + 2
    left = sites["embed/embedding#dot"]
    assert left["algorithm"] is left["scheme"] is None and "*embed*" in left["reason"]
    assert left["sqnr_db"] is None and left["rule"] == "*embed*"
    site = sites["layers/0/mlp/down/kernel#dot"]
    assert (site["algorithm"], site["scheme"]) == ("nearest", "int8 channel")
    assert site["activations"] == "int8 channel"
    assert (site["reason"], site["rule"]) == (None, "*")
    assert site["sqnr_db"] == site["errors"]["snr_db"]
    # The best int8 can do on normal numbers with one scale for 128 of them.
    assert 35 < site["errors"]["snr_db"] < 50


def test_the_table_tells_every_site_within_100_columns(jaxquant, model, tmp_path):
    ran = jaxquant("quantize", model, tmp_path / "q", "--recipe", "w8a8")
    *table, _, summary = ran.out.splitlines()
    assert max(map(len, table)) <= 100
    rows = [line.split() for line in table if "kernel#dot " in line]
    assert len(rows) == 7 * tiny_llama.LAYERS
    for row in rows:
        # Site, shape, two schemes, bits, noise, rule.
        assert row[2:7] == ["int8", "channel", "/", "int8", "channel"] and row[9] == "*"
        assert 8 < float(row[7]) < 9 and 35 < float(row[8]) < 50
    assert "norm/scale: no site; read by" in ran.out
    assert "most noise in layers/" in summary


CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def test_gptq_from_windows_of_ids(jaxquant, model, tokens, tmp_path):
    out, file = tmp_path / "q", tmp_path / "q.json"
    data = ("--calibration", tokens, "--json", file)
    ran = jaxquant("quantize", model, out, "--recipe", CONFIGS / "gptq_w2_asym_g64.toml", *data)
    assert ran.code == 0 and ran.err == ""
    header, *lines = ran.out.splitlines()
    assert header.split() == ["block", "site", "before", "after", "seconds", "ETA"]
    table = [line.split() for line in lines[: 2 * 7 * tiny_llama.LAYERS]]
    rows, notes = table[::2], table[1::2]
    assert [row[0] for row in rows] == ["layers/0"] * 7 + ["layers/1"] * 7
    # 48 tokens leave most of 128 columns without a say.
    assert all(" ".join(note).startswith("note: 48 rows for ") for note in notes)
    assert rows[6][1] == "mlp/down/kernel#dot"
    assert all(len(row) == 6 and float(row[3]) < float(row[2]) for row in rows)
    assert "14 sites calibrated: on this data their outputs err 0." in ran.out
    result = json.loads(file.read_text())
    told = result["calibration"]
    assert (told["file"], told["windows"], told["length"]) == (str(tokens), 3, 16)
    assert (told["forward"], told["scalings"], told["unscaled"]) == ("float32", [], [])
    # Those of the quantized model, of the float one beside it, and what compares the two.
    assert told["compiled"] < 16
    sites = {site["site"]: site for site in result["sites"]}
    assert sites["embed/embedding#dot"]["algorithm"] is None
    site = sites["layers/0/mlp/down/kernel#dot"]
    assert (site["algorithm"], site["scaling"]) == ("gptq", None)
    assert site["scheme"] == "uint2+zero g64" and site["folds"] == []
    assert 0 < site["error"] < site["nearest_error"] and site["seconds"] > 0
    assert site["errors"]["snr_db"] == site["sqnr_db"]
    assert site["notes"][0].startswith("48 rows for 128 inputs")
    assert not (tmp_path / "q.calibration").exists()
    opened = open_model(out)
    assert opened.plan is not None and opened.plan.recipe == "gptq_w2_asym_g64"
    assert np.isfinite(opened.ready()(np.zeros((1, 4), np.int32))).all()


def test_outliers_are_told(jaxquant, model, tmp_path):
    file = tmp_path / "q.json"
    ran = jaxquant("quantize", model, tmp_path / "q", "--recipe", "llm_int8", "--json", file)
    assert ran.code == 0
    sites = json.loads(file.read_text())["sites"]
    (told,) = {str(site["outliers"]) for site in sites if site["reason"] is None}
    assert told == str({"threshold": 6.0, "weights": "dequantized", "columns": None})


def test_smoothquant_from_text(jaxquant, model, tmp_path):
    (tmp_path / "a.txt").write_text("In the beginning was the word. " * 20)
    file = tmp_path / "q.json"
    data = ("--calibration", tmp_path / "a.txt", "--length", 32, "--windows", 6, "--batch", 3)
    options = ("--forward", "bfloat16", "--json", file)
    recipe = ("--recipe", "smoothquant_w8a8_static")
    ran = jaxquant("quantize", model, tmp_path / "q", *recipe, *data, *options)
    assert ran.code == 0 and ran.err == ""
    assert "attention_norm/scale -> attention/{q,k,v}/kernel" in ran.out
    assert "8 inputs scaled; the rows above" in ran.out
    result = json.loads(file.read_text())
    told = result["calibration"]
    assert (told["windows"], told["length"], told["forward"]) == (6, 32, "bfloat16")
    assert [row["sites"][0] for row in told["scalings"]][3] == "layers/0/mlp/down/kernel#dot"
    site = next(row for row in result["sites"] if row["path"].endswith("1/mlp/gate/kernel"))
    assert (site["algorithm"], site["scaling"]) == ("nearest", "smoothquant")
    assert site["folds"] == ["layers/1/mlp_norm/scale -> layers/1/mlp/{gate,up}/kernel"]
    assert (site["nearest_error"], site["error"], site["notes"]) == (None, None, [])
    assert (site["activations"], site["static"], site["outliers"]) == ("int8 tensor", True, None)
    # What was folded computes what the model did, up to eight bits and fixed ranges.
    evaluated = tmp_path / "e.json"
    score = ("--text", tmp_path / "a.txt", "--length", 32, "--against", model, "--json", evaluated)
    assert jaxquant("evaluate", tmp_path / "q", *score).code == 0
    assert 0 < json.loads(evaluated.read_text())["kl"] < 1e-2


def test_a_folder_of_ours_is_replaced(jaxquant, model, quantized):
    assert jaxquant("quantize", model, quantized, "--recipe", "w4a16_g64").code == 0
    _, plan = load(quantized)
    assert plan.recipe == "w4a16_g64"


def test_a_recipe_may_be_a_file(jaxquant, model, tmp_path):
    text = 'name = "mine"\n[[rules]]\nmatch = "embed*"\nleave = true\n[[rules]]\nmatch = "*"\n'
    (tmp_path / "mine.toml").write_text(
        text + 'weights = { values = "int8", contracted = "all" }\n'
    )
    ran = jaxquant("quantize", model, tmp_path / "q", "--recipe", tmp_path / "mine.toml")
    assert ran.code == 0 and "by mine" in ran.out


def test_a_model_without_tokenizer_is_quantized_all_the_same(jaxquant, tmp_path, tokens):
    path = tiny_llama.write_gguf(tmp_path / "model.gguf")
    assert jaxquant("quantize", path, tmp_path / "q", "--recipe", "w8a16").code == 0
    assert jaxquant("evaluate", tmp_path / "q", "--tokens", tokens).code == 0
    (tmp_path / "a.txt").write_text("words " * 200)
    ran = jaxquant("evaluate", tmp_path / "q", "--text", tmp_path / "a.txt")
    assert ran.code == 2 and "tokenizer" in ran.err


def test_peak_memory_is_that_of_this_process():
    before = peak_rss_bytes()
    held = np.ones(1 << 25)
    assert peak_rss_bytes() >= before
    assert peak_rss_bytes() > held.nbytes
    del held


@pytest.mark.registry
@pytest.mark.slow
def test_a_real_model_takes_less_than_a_gigabyte(smollm2_gguf, tmp_path):
    out, file = tmp_path / "q", tmp_path / "q.json"
    recipe = ["--recipe", "w4a16_g64", "--json", str(file)]
    command = [sys.executable, "-m", "jaxquant", "quantize", str(smollm2_gguf), str(out), *recipe]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(file.read_text())
    assert result["peak_rss_bytes"] <= 1.0e9
    assert result["parameters"] == 134_515_008
    assert size_of(out) <= 1.03 * result["bytes"]
    assert jax.process_count() == 1
