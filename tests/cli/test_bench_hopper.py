"""`jaxquant bench kernels --target h100`: bars by hand, and what the compiler makes of kernels."""

import json

import pytest

from jaxquant.cli import _bench_hopper as bench
from jaxquant.cli._bench_hopper import (
    facts,
    hopper_bars,
    hopper_call,
    hopper_cases,
    hopper_table,
    hopper_verdict,
    matrix_text,
)
from jaxquant.ops.dot._cases import Case, DECODE, HELD, Linear, linear_of, SHAPES, SQUARE

WGMMA = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"


def _kernel(**changed):
    return {
        "name": "weight_only_int4",
        "grid": [32, 4, 1],
        "threads": 256,
        "registers": 97,
        "shared_bytes": 20480,
        "spill_bytes": 0,
        "blocks": 2,
        "loops": 1,
        "matrix": {WGMMA: 9},
        "matrix_in_loops": {WGMMA: 8},
        "loads": {"2": 4, "8": 1, "16": 6},
        "loads_in_loops": {"2": 3, "16": 4},
        "loads_of": {"0": {"16": 2}, "1": {"8": 1, "16": 4}},
        "loads_of_in_loops": {"0": {"16": 2}, "1": {"16": 2}},
        "bulk_loads": 0,
        "warnings": [],
        **changed,
    }


def _row(kernel, spills=0):
    side = {
        "hbm_bytes": 13_500_000,
        "temporary_bytes": 8_000_000,
        "library_calls": {},
        "kernels": [kernel],
    }
    sides = {"kernel": side, "xla": {**side, "kernels": [], "library_calls": {"__cublas$gemm": 1}}}
    call = {"target": "h100", "k": 4096, "n": 4096, "held": "int4 g128", "rows": 16}
    call["needed_bytes"] = 9_000_000
    return {**call, **facts(kernel), "splits": 4, "spills": spills, "sides": sides}


def test_what_stands_in_the_loop_counts_and_the_rest_where_there_is_none():
    looped = facts(_kernel())
    assert (looped["matrix"], looped["code_loads"]) == ({WGMMA: 8}, {"16": 2})
    assert not looped["unrolled"]
    unrolled = facts(_kernel(loops=0, matrix_in_loops={}, loads_of_in_loops={}))
    assert (unrolled["matrix"], unrolled["code_loads"]) == ({WGMMA: 9}, {"8": 1, "16": 4})
    assert unrolled["unrolled"]
    # A loop without them is no unrolled one.
    assert facts(_kernel(matrix_in_loops={}))["matrix"] == {}


def test_bars_are_counted_and_said():
    rows = [
        _row(_kernel()),
        _row(_kernel(loops=0, loads_of={"1": {"16": 4}})),
        _row(_kernel(matrix_in_loops={}, blocks=1)),
        _row(_kernel(loads_of_in_loops={"1": {"8": 1, "16": 2}}), spills=8),
        _row(_kernel(loads_of_in_loops={"0": {"16": 2}})),
    ]
    found = hopper_bars(rows)
    assert found == {
        "no_spills": {"held": 4, "of": 5, "unrolled": 1},
        "matrix_in_loop": {"held": 4, "of": 5, "unrolled": 1},
        "wide_loads": {"held": 3, "of": 5, "unrolled": 1},
        "blocks": {"held": 4, "of": 5, "unrolled": 1},
    }
    assert hopper_verdict("h100", found) == (
        "h100: no spills 4/5; tensor-core instructions in the loop 4/5; 16-byte loads of codes "
        "3/5; at least 2 blocks a multiprocessor 4/5. Of 1 the loop is unrolled."
    )


@pytest.mark.parametrize(
    "kind, text",
    [
        (WGMMA, "8 wgmma m64n16k16 bf16"),
        ("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8", "8 wgmma m64n64k32 s8"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "8 mma m16n8k16 bf16"),
        ("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3", "8 wgmma m64n8k32 e4m3"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "8 mma m16n8k8 tf32"),
    ],
)
def test_instructions_in_short(kind, text):
    assert matrix_text({kind: 8}) == text


def test_a_table_has_a_line_for_each_side():
    made = hopper_table([_row(_kernel(loops=0))])
    cells = [list(column.cells) for column in made.columns]
    assert cells[1] == ["kernel", "xla"]
    assert [column[0] for column in cells] == [
        *("16", "kernel", "32x4", "97", "0", "20", "2", "9 wgmma m64n16k16 bf16*"),
        *("1x8 4x16", "8.0", "1.50"),
    ]
    assert cells[7][1] == "__cublas$gemm"


def test_every_decode_call_whose_groups_are_whole():
    barred, others = hopper_cases(quick=False)
    whole = [linear for linear in SHAPES if linear.k % 128 == 0]
    assert len(barred) == len(DECODE) * (len(SHAPES) + 2 * len(whole)) > 400
    assert {case.held.name for case in barred} == set(bench.FORMATS)
    assert {case.rows for case in others} == {16, 64}
    quick, _ = hopper_cases(quick=True)
    assert [(case.linear, case.rows) for case in quick] == 3 * [(SQUARE, 1)]


@pytest.mark.aot
@pytest.mark.parametrize("held", bench.FORMATS)
@pytest.mark.parametrize("rows", [1, 64])
def test_the_bars_hold(held, rows):
    row = hopper_call(Case(linear=linear_of(8192, 1024), rows=rows, held=HELD[held]), "h100")
    assert all(found["held"] == 1 for found in hopper_bars([row]).values()), row
    assert not row["unrolled"] and not row["warnings"]
    assert row["splits"] == row["grid"][1] > 1
    assert row["bound_seconds"] == pytest.approx(row["needed_bytes"] / 3.35e12)
    # The codes of a turn of the loop, each read once.
    (turns,) = {
        row["k"] * row["n"] * bits / 8 / (row["grid"][0] * row["splits"] * row["threads"] * 16 * n)
        for bits in [8 if held == "int8" else 4]
        for n in row["code_loads"].values()
    }
    assert turns == int(turns) > 1


@pytest.mark.aot
def test_two_blocks_also_where_sums_are_not_split():
    """The head of Llama-3 8B, whose outputs fill the chip."""
    row = hopper_call(Case(linear=linear_of(4096, 128256), rows=64, held=HELD["int4 g128"]), "h100")
    assert row["splits"] == 1 and row["blocks"] >= bench.BLOCKS and row["spills"] == 0


@pytest.mark.aot
def test_a_short_sum_is_unrolled():
    short = Linear(model="", part="", k=256, n=512)
    row = hopper_call(Case(linear=short, rows=16, held=HELD["int8"]), "h100")
    assert row["unrolled"] and set(row["code_loads"]) == {"16"} and row["matrix"]
    assert hopper_bars([row])["matrix_in_loop"] == {"held": 1, "of": 1, "unrolled": 1}


@pytest.mark.aot
def test_the_command_writes_what_it_shows(jaxquant, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FORMATS", ("int4 g128",))
    monkeypatch.setattr(bench, "OTHERS", ("w8a8 int8",))
    options = ("--quick", "--jobs", 1, "--target", "h100", "--json", tmp_path / "k.json")
    ran = jaxquant("bench", "kernels", *options)
    assert ran.code == 0 and "h100 4096x4096 w8a8 int8" in ran.out
    assert "h100: no spills 1/1; tensor-core instructions in the loop 1/1" in ran.out
    written = json.loads((tmp_path / "k.json").read_text())
    ((row,), (other,)) = written["calls"], written["others"]
    assert set(row["sides"]) == {"kernel", "xla", "dequantize, dot"}
    # XLA writes the dequantized weight; the kernel writes none but sums of its splits.
    plain, ours = row["sides"]["dequantize, dot"], row["sides"]["kernel"]
    assert ours["temporary_bytes"] < plain["temporary_bytes"]
    assert set(other["code_loads"]) == {"16"} and "s8" in next(iter(other["matrix"]))
