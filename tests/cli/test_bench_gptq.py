"""`jaxquant bench gptq`: ours beside what is installed, and what is not, said."""

import importlib.util
import json

import numpy as np
import pytest

from jaxquant.algorithms import GPTQ
from jaxquant.cli import _bench_gptq as bench
from jaxquant.cli._bench_gptq import gptq_input, gptq_rows, OURS, QWIX, SCHEME, TORCH

SMALL = ((8, 64), (4, 128))


@pytest.fixture
def alone(monkeypatch):
    """Without peers, whichever are installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_what_is_not_installed_is_said(jaxquant, tmp_path, monkeypatch, alone):
    monkeypatch.setattr("jaxquant.cli._bench.SHAPES", SMALL)
    ran = jaxquant("bench", "gptq", "--rounds", 2, "--json", tmp_path / "b.json")
    assert ran.code == 0 and ran.err == ""
    assert "absent: pip install torch" in ran.out and "Load of the machine" in ran.out
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["bench"] == "gptq" and result["threads"] >= 1
    assert [row["name"] for row in result["sides"]] == 2 * [OURS, QWIX, TORCH]
    for row in result["sides"]:
        if row["name"] == OURS:
            assert len(row["seconds"]) == 3 and row["warm_ratio"] == row["first_ratio"] == 1
        else:
            assert row["warm_seconds"] is None and row["warm_ratio"] is None


def test_a_few_columns_are_scaled_to_all_but_compilation_is_not(monkeypatch, alone):
    rows = gptq_rows(SMALL[:1], rounds=2, progress=lambda done, all: None)
    assert rows[0]["warm_seconds"] == np.median(rows[0]["seconds"][1:])
    made = bench._row(QWIX, (8, 512), None, [10.0, 2.0, 3.0, 2.5])
    assert made["said"] == "128 columns, times 4"
    assert (made["warm_seconds"], made["first_seconds"]) == (10.0, 17.5)


def test_the_inputs_are_worth_it():
    w, gram = gptq_input(8, 128)
    given = bench.jnp.asarray(w), {"gram": bench.jnp.asarray(gram)}
    chosen = GPTQ(measured=True).run(*given, SCHEME)
    assert chosen.losses.sum() < 0.9 * chosen.plain_losses.sum()
