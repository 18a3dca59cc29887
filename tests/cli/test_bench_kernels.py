"""`jaxquant bench kernels`: ratios by hand, and the bars of the issue on v5e and v6e."""

import json

import pytest

from jaxquant.cli import _bench_hopper, _bench_kernels as bench
from jaxquant.cli._bench_kernels import bars, call, CODES, codes_call, codes_table, FORMATS, verdict
from jaxquant.ops.dot._cases import Case, HELD, SQUARE


def _row(held="int4 g128", **ratios):
    return {
        "held": held,
        "scheduled_ratio": 1.0,
        "bytes_ratio": 1.0,
        "xla_bytes_ratio": 4.0,
        "xla_accessed_ratio": 4.0,
        "bfloat16_ratio": 3.0,
        **ratios,
    }


def test_bars_are_counted_and_said():
    rows = [
        _row(),
        _row(scheduled_ratio=1.16, bfloat16_ratio=2.4),
        _row("int8", xla_bytes_ratio=1.0, bfloat16_ratio=2.0),
    ]
    found = bars(rows)
    assert found["scheduled_ratio"] == {"held": 2, "of": 3}
    assert found["bytes_ratio"] == {"held": 3, "of": 3}
    assert found["xla_bytes_ratio"] == {"held": 2, "of": 2}
    assert found["bfloat16_ratio"] == {"held": 1, "of": 2}
    assert "v5e: scheduled at most 1.15x the bytes bound 2/3" in verdict("v5e", found)
    assert verdict("v4", found).startswith("v4 (no bar here): ")


def test_a_schedule_that_was_not_read_whole_says_so():
    row = {"target": "v5e", "k": 8, "n": 8, "held": "int8", "rows": 16}
    row |= {"scheduled_seconds": 2e-6, "bound_seconds": 1e-6}
    sides = [{"scheduled_seconds": 3e-6, "known": known} for known in (True, False)]
    made = codes_table([{**row, "sides": {"xla": side}} for side in sides])
    assert [list(column.cells) for column in made.columns][2:] == [
        ["2.0", "2.0"],
        ["3.0", ">3.0"],
        ["1.0", "1.0"],
    ]


def test_the_wrong_target_is_refused(jaxquant):
    ran = jaxquant("bench", "kernels", "--target", "v9")
    assert ran.code == 2 and "--target v9 is not known" in ran.err


@pytest.mark.aot
@pytest.mark.parametrize("target", bench.BARRED)
@pytest.mark.parametrize("held", FORMATS)
@pytest.mark.parametrize("rows", [1, 64])
def test_the_bars_hold(target, held, rows):
    row = call(Case(linear=SQUARE, rows=rows, held=HELD[held]), target)
    assert row["scheduled_ratio"] <= bench.SCHEDULED
    assert row["bytes_ratio"] <= bench.MOVED
    assert row["bound_seconds"] <= row["scheduled_seconds"] <= row["compute_bound_seconds"] or (
        row["memory_seconds"] >= row["compute_bound_seconds"]
    )
    if held.startswith("int4"):
        assert row["bfloat16_ratio"] >= bench.TIME_AGAINST_BFLOAT16
    else:
        assert row["sides"]["bfloat16"]["hbm_bytes"] == pytest.approx(
            2 * row["sides"]["kernel"]["hbm_bytes"], rel=0.1
        )


@pytest.mark.aot
@pytest.mark.parametrize("held", CODES)
def test_codes_by_codes_are_bound_by_their_bytes(held):
    row = codes_call(Case(linear=SQUARE, rows=16, held=HELD[held]), "v6e")
    bits = 4 if held == "w4a8 int4" else 8
    assert row["needed_bytes"] == pytest.approx(4096 * 4096 * bits // 8, rel=0.05)
    assert set(row["sides"]) == {"kernel", "xla"}
    assert row["scheduled_ratio"] <= bench.SCHEDULED and row["xla_ratio"] > 1


@pytest.mark.aot
def test_the_command_writes_what_it_shows(jaxquant, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FORMATS", ("int8",))
    options = ("--quick", "--jobs", 1, "--target", "v5e", "--json", tmp_path / "k.json")
    ran = jaxquant("bench", "kernels", *options)
    assert ran.code == 0 and "v5e 4096x14336" in ran.out and "v5e: scheduled at most" in ran.out
    written = json.loads((tmp_path / "k.json").read_text())
    assert [row["n"] for row in written["calls"]] == [4096, 14336]
    assert written["targets"]["v5e"]["bytes_ratio"] == {"held": 2, "of": 2}
    assert [row["held"] for row in written["others"]] == ["w8a8 int8"]
    assert "codes by codes" in ran.out


@pytest.mark.aot
def test_tpus_and_gpus_in_one_run(jaxquant, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FORMATS", ())
    monkeypatch.setattr(_bench_hopper, "FORMATS", ("int8",))
    monkeypatch.setattr(_bench_hopper, "OTHERS", ())
    options = ("--quick", "--jobs", 1, "--json", tmp_path / "k.json")
    ran = jaxquant("bench", "kernels", *options, "--target", "v5e", "--target", "h100")
    assert ran.code == 0 and "h100: no spills 1/1" in ran.out
    written = json.loads((tmp_path / "k.json").read_text())
    assert [row["target"] for row in written["calls"]] == ["h100"]
    assert [row["target"] for row in written["others"]] == ["v5e"]
    assert list(written["targets"]) == ["v5e", "h100"]
