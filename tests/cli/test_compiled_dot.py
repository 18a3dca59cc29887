"""Compiled dots: bytes by hand, conditions of kernels, and what is said when nothing compiles."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxquant.aot import Loop, parse_target, Program
from jaxquant.cli import _compiled_dot as module
from jaxquant.cli._compiled_dot import compile_dot, compiled, needed_bytes, run_jobs, Status
from jaxquant.ops.dot._cases import Case, HELD, Linear

SMALL = Linear(model="", part="", k=1024, n=512)


def _case(name, rows=16, linear=SMALL):
    return Case(linear=linear, rows=rows, held=HELD[name])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("int8", 1024 * 512 + 4 * 512),
        ("int4 g128", 1024 * 512 // 2 + 2 * 8 * 512),
        ("int4 g128 zero", 1024 * 512 // 2 + 2 * 8 * 512 + 8 * 512 // 2),
        ("int3 g64", 1024 * 512 * 3 // 8 + 2 * 16 * 512),
        ("mxfp4", 1024 * 512 // 2 + 32 * 512),
    ],
)
def test_needed_bytes_by_hand(name, expected):
    assert needed_bytes(_case(name)) == expected + 2 * 16 * (1024 + 512)


def test_activations_come_as_they_are_and_are_rounded_by_the_kernel():
    assert needed_bytes(_case("w8a8 int8")) == needed_bytes(_case("int8"))


def _program(grid, conditional, bundles=1000):
    steps = grid[2] * grid[3]
    loop = Loop(
        depth=1,
        bundles=bundles,
        turns=steps + 2,
        steps=steps,
        skipped=bundles - 10,
        used={},
        grid=grid,
        conditional=conditional,
    )
    return Program(name="k", bundles=bundles, outside=5, loops=(loop,), capacity={}, used={})


@pytest.mark.parametrize(
    "grid, conditional, left, set_up",
    [
        # The set-up runs once, not in all 8 steps.
        ((1, 1, 8, 1), (300,), 7 * 300, 300),
        ((1, 1, 8, 1), (), 0, 0),
        # Once for each of 4 steps along k; the first and the last step along k once in 4.
        ((1, 1, 8, 4), (300, 20, 30, 40), 28 * 300 + 24 * 20 + 16 * 30 + 24 * 40, 300),
        ((1, 1, 8, 4), (20, 30, 40), 24 * 20 + 16 * 30 + 24 * 40, 0),
        # What is not of this form is counted in every step.
        ((1, 1, 8, 1), (300, 20), 0, 0),
    ],
)
def test_code_under_a_condition_runs_when_it_holds(grid, conditional, left, set_up):
    program = _program(grid, conditional)
    assert module._left_out(program) == (left, set_up)
    cycles = module._cycles([(1, program, True)])
    assert (cycles.bound, cycles.exact) == (program.cycles, program.cycles - left)
    assert cycles.step == 1000 - set_up
    assert module._cycles([(1, program, False)]).exact == program.cycles


def test_jobs_come_back_in_order():
    done = []
    found = run_jobs([(pow, (2, 3)), (pow, (3, 2))], 1, lambda done_, all_: done.append(done_))
    assert found == [8, 9] and done == [0, 1, 2]


@pytest.mark.aot
def test_a_call_is_compiled_refused_or_fails():
    target, _ = parse_target("v5e")
    made = compile_dot(_case("int4 g128"), "mosaic_tpu", target)
    assert made.status is Status.COMPILED and made.figures is not None
    figures = made.figures
    assert figures.hbm_bytes == needed_bytes(_case("int4 g128")) and figures.known
    assert 0 < figures.first_bytes < figures.hbm_bytes and figures.vmem_bytes
    assert 0 < figures.cycles.exact <= figures.cycles.bound
    no = compile_dot(_case("int8"), "xla_cpu", target, schedule=False)
    assert no.status is Status.REFUSED and "refuses" in no.reason and no.figures is None

    def bad(x):
        return jax.lax.dot(x, x.astype(jnp.float32))

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    failed = compiled(bad, (x,), target, schedule=False)
    assert failed.status is Status.FAILED and "ValueError" in failed.reason


@pytest.mark.aot
def test_what_is_read_again_is_counted():
    target, _ = parse_target("v5e")
    # Two tiles of rows, two of columns: the weight is read twice.
    linear = dataclasses.replace(SMALL, n=2048)
    case = dataclasses.replace(_case("int4 g128", linear=linear), rows=256)
    made = compile_dot(case, "mosaic_tpu", target, schedule=False)
    weight = 1024 * 2048 // 2 + 2 * 8 * 2048
    assert made.figures.hbm_bytes == needed_bytes(case) + weight
    assert made.figures.cycles is None
