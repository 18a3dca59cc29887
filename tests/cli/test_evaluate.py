"""`jaxquant evaluate`: its keys, from tokens and from text, alone and against a reference."""

import json

import numpy as np
import pytest

from jaxquant.evaluate import score
from jaxquant.models import open_model

ALONE = {"nll", "perplexity", "nll_per_window", "tokens", "seconds"}
COMPARED = {"kl", "top1", "nll_difference", "nll_difference_stderr"}


def test_json_has_the_fixed_keys(jaxquant, model, tokens, tmp_path):
    file = tmp_path / "e.json"
    assert jaxquant("evaluate", model, "--tokens", tokens, "--json", file).code == 0
    result = json.loads(file.read_text())
    assert result.keys() >= ALONE and not result.keys() & COMPARED
    with np.load(tokens) as held:
        expected = score(open_model(model).ready(), held["tokens"])
    assert result["nll"] == expected.nll
    assert result["perplexity"] == pytest.approx(np.exp(expected.nll))
    assert result["tokens"] == 3 * 15 and len(result["nll_per_window"]) == 3


def test_against_a_reference(jaxquant, model, quantized, tokens, tmp_path):
    file = tmp_path / "e.json"
    arguments = ("evaluate", quantized, "--tokens", tokens, "--against", model, "--json", file)
    ran = jaxquant(*arguments)
    assert ran.code == 0 and ran.err == "" and "by w8a16" in ran.out and "KL" in ran.out
    result = json.loads(file.read_text())
    assert result.keys() >= ALONE | COMPARED
    assert 0 < result["kl"] < 1e-2 and 0.5 < result["top1"] <= 1
    assert abs(result["nll_difference"]) < 0.1 and result["nll_difference_stderr"] > 0
    itself = ("evaluate", model, "--tokens", tokens, "--against", model, "--json", file)
    assert jaxquant(*itself).code == 0
    assert json.loads(file.read_text())["kl"] == 0


def test_text_is_cut_into_windows(jaxquant, model, quantized, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    file = tmp_path / "e.json"
    for path in (model, quantized):
        arguments = ("--text", tmp_path / "a.txt", "--length", 16, "--batch", 4, "--json", file)
        assert jaxquant("evaluate", path, *arguments).code == 0
        assert json.loads(file.read_text())["tokens"] == 6 * 15
