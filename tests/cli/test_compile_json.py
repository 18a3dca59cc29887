"""Keys of `jaxquant compile --json`, and the sums in them. Nothing is compiled here."""

import dataclasses
import json

import pytest
from jax.sharding import PartitionSpec as P

from jaxquant.aot import (
    Collective,
    Compiled,
    CompiledStep,
    DecoderStep,
    HloFacts,
    Memory,
    Roofline,
    Step,
    TARGETS,
    TpuSchedule,
)
from jaxquant.cli._compile_json import (
    beside,
    collectives,
    fits_side_by_side,
    overlapped,
    spec_json,
    step_json,
    total_bytes,
)

TARGET = TARGETS["v5e"]
BOUND = Roofline(bytes=90, operations={"bf16": 7.0}, memory_seconds=2.0, compute_seconds=1.0)


def _collective(name, shapes=("bf16[16,8]",), size=256):
    return Collective(kind="all-reduce", name=name, bytes=size, shapes=shapes, runs=2)


def _step(total=100, moving=(), exchanges=(), seen=8):
    ran = Step(
        name="k.1",
        opcode="custom-call",
        op_name="",
        kernel="k",
        read=40,
        written=10,
        on_chip=0,
        runs=3,
    )
    compiled = Compiled(
        target=TARGET,
        devices=2,
        memory=Memory(arguments=total - 30, outputs=10, temporaries=15, aliased=0, code=5),
        cost=None,
        text="",
        hlo=HloFacts(steps=(ran,), collectives=tuple(exchanges), unknown_loops=()),
        schedule=None,
        kernels=(),
    )
    return dataclasses.replace(
        _refused(),
        compiled=compiled,
        refused=None,
        moving_weights=tuple(moving),
        step=DecoderStep(rows=4, new=1, seen=seen),
    )


def _refused():
    return CompiledStep(
        step=DecoderStep(rows=4, new=1, seen=8),
        held={"codes": 50, "cache": 20},
        roofline=BOUND,
        compiled=None,
        refused="too much",
        moving_weights=(),
        seconds=0.0,
    )


def test_a_step_is_what_the_compiler_says():
    found = step_json(_step())
    assert found["bytes"] == {"codes": 50, "cache": 20, "temporaries": 15, "program": 5}
    assert (found["bytes_of_padding"], found["bytes_in_all"]) == (10, 100)
    assert found["fits"] and found["refused"] is None and found["cache_length"] == 8
    assert found["roofline"]["seconds"] == 2.0
    assert found["program"] == {
        "bytes_moved": 150,
        "memory_seconds": 150 / 819e9,
        "custom_calls": {"k": 3},
        "schedule": None,
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_step_that_does_not_fit_has_no_program():
    found = step_json(_refused())
    assert not found["fits"] and found["refused"] == "too much" and found["program"] is None
    assert found["bytes_in_all"] == 70 and found["bytes_of_padding"] is None
    assert found["collectives"] == [] and total_bytes(_refused()) == 70


def test_exchanges_that_are_alike_are_one_row():
    one, two, other = _collective("a"), _collective("b"), _collective("c", ("s4[8]",), 4)
    rows = collectives(_step(exchanges=(one, other, two), moving=(other,)))
    assert rows == [
        {"kind": "all-reduce", "shapes": ["bf16[16,8]"], "bytes": 256, "runs": 4, "weights": False},
        {"kind": "all-reduce", "shapes": ["s4[8]"], "bytes": 4, "runs": 2, "weights": True},
    ]
    assert step_json(_step(moving=(other,)))["collectives_of_weights"] == 2


def test_a_prefill_has_to_fit_beside_the_cache_of_decoding():
    steps = {"decode": _step(), "prefill": _step(total=200, seen=0)}
    assert beside(steps) == 220 and fits_side_by_side(TARGET, steps)
    steps["prefill"] = _step(total=TARGET.hbm_bytes - 10, seen=0)
    assert not fits_side_by_side(TARGET, steps)
    assert fits_side_by_side(TARGET, {"decode": _step()})
    assert not fits_side_by_side(TARGET, {"decode": _refused()})


def test_overlap_ends_at_the_roofline():
    schedule = TpuSchedule(programs={}, top_level=None)
    step = _step()
    compiled = dataclasses.replace(step.compiled, schedule=schedule)
    step = dataclasses.replace(step, compiled=compiled)
    # 150 bytes take less than the two seconds that the roofline says.
    assert overlapped(step) == 2.0
    slow = dataclasses.replace(BOUND, memory_seconds=1e-12, compute_seconds=0.0)
    assert overlapped(dataclasses.replace(step, roofline=slow)) == pytest.approx(150 / 819e9)
    assert step_json(step)["program"]["schedule"]["overlapped_over_roofline"] == 1.0


@pytest.mark.parametrize(
    ("spec", "names"),
    [(P(), []), (P(None, "kv"), [[], ["kv"]]), (P(("kv", "rest"), None), [["kv", "rest"], []])],
)
def test_specs_are_lists_of_names(spec, names):
    assert spec_json(spec) == names
