"""`jaxquant bench compile-matrix`: every call compiles or is refused; what fails is an error."""

import json

import pytest

from jaxquant.cli import _bench_matrix as bench
from jaxquant.cli._bench_matrix import matrix_table, quick_cases, reasons, wanted_targets
from jaxquant.cli._compiled_dot import Outcome, Status
from jaxquant.ops.dot import KERNELS
from jaxquant.ops.dot._cases import HELD


def test_targets_by_name():
    assert [t.name for t in wanted_targets(["v6e", "v4", "v6e"])] == ["v6e", "v4"]
    assert len(wanted_targets(["v4", "all"])) == 6
    with pytest.raises(ValueError, match="--target v9 is not known. Known are v4, v5e"):
        wanted_targets(["v9"])


def test_a_quick_run_has_every_format():
    assert [case.held.name for case in quick_cases()] == list(HELD)


def test_a_call_that_fails_makes_the_command_fail(jaxquant, tmp_path, monkeypatch):
    def compile_dot(case, kernel, target, *, schedule):
        if case.held.name == "nf4 g64":
            return Outcome(status=Status.FAILED, reason="RuntimeError: Mosaic says no")
        return Outcome(status=Status.REFUSED, reason="it is for others")

    monkeypatch.setattr(bench, "compile_dot", compile_dot)
    options = ("--quick", "--jobs", 1, "--target", "v5e", "--json", tmp_path / "m.json")
    ran = jaxquant("bench", "compile-matrix", *options)
    assert ran.code == 1
    assert f"FAILED, {len(KERNELS)}, as nf4 g64 16x1024x2048" in ran.out
    assert "Mosaic says no" in ran.out and f"refused, {len(KERNELS) * (len(HELD) - 1)}" in ran.out
    written = json.loads((tmp_path / "m.json").read_text())
    assert written["failed"] == len(KERNELS)
    assert len(written["cases"]) == len(KERNELS) * len(HELD)


def test_rows_are_counted_by_target():
    row = {"kernel": "k", "held": "h", "rows": 1, "k": 2, "n": 3, "dtype": "d", "reason": "r"}
    rows = [
        {**row, "target": "v4", "status": "compiled"},
        {**row, "target": "v4", "status": "FAILED"},
        {**row, "target": "v5e", "status": "refused"},
    ]
    made = matrix_table(rows)
    assert [list(column.cells) for column in made.columns] == [["k"], ["h"], ["1/2 1!"], ["0/1"]]
    assert reasons(rows) == [
        "FAILED, 1, as h 1x2x3 d by k for v4: r",
        "refused, 1, as h 1x2x3 d by k for v5e: r",
    ]


@pytest.mark.parametrize("option", ["--model", "--recipe"])
def test_it_has_no_model(jaxquant, option):
    ran = jaxquant("bench", "compile-matrix", option, "x")
    assert ran.code == 2 and "no model and no recipe" in ran.err


CUT = ("int8", "int4 g128", "int4 g128 zero", "int2 g128")


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v4", "v5e", "v5p", "v6e", "7x", "h100"])
def test_a_cut_compiles(target, jaxquant, tmp_path, monkeypatch):
    cases = tuple(case for case in quick_cases() if case.held.name in CUT)
    monkeypatch.setattr(bench, "quick_cases", lambda: cases)
    options = ("--quick", "--jobs", 1, "--target", target, "--json", tmp_path / "m.json")
    ran = jaxquant("bench", "compile-matrix", *options)
    assert ran.code == 0, ran.out
    found = json.loads((tmp_path / "m.json").read_text())["cases"]
    if target != "h100":
        for row in (row for row in found if row["kernel"] == "mosaic_tpu"):
            assert row["status"] == "compiled", row
            assert row["hbm_bytes"] <= 1.1 * row["needed_bytes"]
