"""`jaxquant bench`: every side is timed as often, and compared with the first."""

import json

import pytest

from jaxquant.cli._bench import machine, side_rows
from jaxquant.evaluate import Timing


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_sides_of_a_model(jaxquant, model, tmp_path, name):
    recipes = ("--recipe", "w8a16", "--recipe", "w8a8")
    options = ("--rounds", 3, "--length", 32, "--json", tmp_path / "b.json")
    ran = jaxquant("bench", name, "--model", model, *recipes, *options)
    assert ran.code == 0 and ran.err == ""
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["bench"] == name and result["rounds"] == 3
    assert [side["name"] for side in result["sides"]] == ["float32", "w8a16", "w8a8"]
    assert all(len(side["seconds"]) == 3 for side in result["sides"])
    assert result["sides"][0]["ratio"] == 1
    assert "w8a8" in ran.out and machine() in ran.out


def test_rows_by_hand():
    timings = {"a": Timing(seconds=(2.0, 2.0, 2.0)), "b": Timing(seconds=(1.0, 4.0, 0.5))}
    rows = side_rows(timings, 8)
    assert [row["tokens_per_second"] for row in rows] == [4.0, 8.0]
    assert [row["ratio"] for row in rows] == [1.0, 2.0]
