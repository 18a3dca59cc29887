"""`jaxquant bench kernels`: what compilers say of decoding, beside XLA's programs and bfloat16."""

import argparse
from collections.abc import Sequence
from typing import Any

import jax

from ..aot import Target, TARGETS
from ..ops.dot._cases import Case, DECODE, HELD, SQUARE, WIDE
from ._bench_hopper import (
    hopper_bars,
    hopper_call,
    hopper_cases,
    hopper_table,
    hopper_verdict,
    KERNEL as OURS,
    LEGEND,
    PLAIN,
    XLA,
)
from ._bench_matrix import wanted_targets
from ._compiled_dot import (
    compile_dot,
    compiled,
    dequantized_dot,
    Job,
    needed_bytes,
    operands,
    Outcome,
    part_seconds,
    run_jobs,
    Status,
)
from ._console import bar, check_json, say, show, table, write_json

FORMATS = ("int4 g128", "int4 g128 zero", "int8")
CODES = ("w8a8 int8", "w8a8 e4m3", "w8a8 e4m3 block", "w4a8 int4")
CODES_ROWS = 16
"""No bar is for these, codes by codes; activations are rounded inside."""
BFLOAT16 = "bfloat16"
BACKEND = "mosaic_tpu"

SCHEDULED, MOVED, BYTES_AGAINST_XLA, TIME_AGAINST_BFLOAT16 = 1.15, 1.05, 3.0, 2.5
"""The bars: at most, at most, at least and at least."""
BARRED = ("v5e", "v6e")
"""The targets that they are for."""


def run_kernels(arguments: argparse.Namespace) -> None:
    """The command. Its JSON: `bench`, `targets` (for each the bars: `held` of `of` calls), and
    `calls`, one for each target, shape, format and number of rows, with

    - `target`, `k`, `n`, `held`, `rows`: which call;
    - `needed_bytes`: codes, scales, zero points, activations and output, once each;
    - `bound_seconds`: these at the bandwidth of the main memory.

    Of a TPU:

    - `step`, `steps`, `set_up`: bundles of a step of the kernel, its steps on one core, and bundles
      that only the first step runs; `spills`, `vmem_bytes`;
    - `compute_seconds`: the bundles at the clock; `compute_bound_seconds`: with the set-up in every
      step; `memory_seconds`: the bytes that move; `scheduled_seconds`: the longer of the first and
      the last; `first_seconds`: the first blocks, which are waited for and in none of the others;
    - `sides`: for the kernel, XLA by our dispatch, a plain `dequantize` and dot, and bfloat16
      weights, each `hbm_bytes` (main memory to chip and back), `on_chip_bytes` (arrays that XLA
      keeps on the chip), `accessed_bytes` (XLA's own count, which has both),
      `scheduled_seconds` and `known`: false where a loop's turns could not be read and it is
      counted once, so that the seconds are too few (only XLA's, in `others`);
    - `scheduled_ratio` (to the bound), `bytes_ratio` (to those needed), `xla_bytes_ratio` and
      `xla_accessed_ratio` (of the plain dequantize and dot, by either count, to the kernel's
      bytes), `xla_ratio` (scheduled seconds of the faster of XLA's two to the kernel's) and
      `bfloat16_ratio` (those of bfloat16).

    Of an H100, whose compiler writes no schedule:

    - `grid`, `splits` (parts of the summed axis), `threads`, `registers`, `shared_bytes`, `blocks`
      (of a multiprocessor), `warnings` (of ptxas): of the kernel; `spills`: bytes, of all kernels
      of the program;
    - `matrix`: tensor-core instructions of the inner loop by kind; `code_loads`: loads of the
      weight's codes there, by the bytes that a thread gets; `unrolled`: there is no loop left, and
      the two are those of the whole kernel;
    - `sides` (the others only for two of the shapes): `hbm_bytes`, `temporary_bytes`,
      `library_calls`, and `kernels`, each with what its PTX and ptxas tell (`aot.CudaKernel`).

    `others` has the same of calls that no bar is for; of a TPU without the ratios to bfloat16 and
    to the plain dequantize and dot. All is read from what compilers wrote: nothing is run.

    **Raises:** `ValueError` if a compiler fails.
    """
    check_json(arguments.json)
    targets = wanted_targets(arguments.target or BARRED)
    wanted = [(target, *_jobs(target, quick=arguments.quick)) for target in targets]
    barred = [job for _, own, _ in wanted for job in own]
    with bar("compiling") as progress:
        rows = run_jobs(
            [*barred, *(job for *_, own in wanted for job in own)], arguments.jobs, progress
        )
    calls, others = rows[: len(barred)], rows[len(barred) :]
    verdicts = {}
    for target in targets:
        own, beside = (_of(target, each) for each in (calls, others))
        if target.platform == "tpu":
            for weight in dict.fromkeys(_weight(row) for row in own):
                show(kernel_table([row for row in own if _weight(row) == weight]))
                show(beside_table([row for row in own if _weight(row) == weight]))
            show(codes_table(beside))
            verdicts[target.name] = found = bars(own)
            say(verdict(target.name, found))
        else:
            shown: dict[tuple[str, str], list[dict[str, Any]]] = {}
            for row in (*own, *beside):
                shown.setdefault((_weight(row), row["held"]), []).append(row)
            for each in shown.values():
                show(hopper_table(each))
            say(LEGEND)
            verdicts[target.name] = found = hopper_bars(own)
            say(hopper_verdict(target.name, found))
    result = {"bench": "kernels", "targets": verdicts, "calls": calls, "others": others}
    write_json(arguments.json, result)


def _of(target: Target, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["target"] == target.name]


def _jobs(target: Target, *, quick: bool) -> tuple[list[Job], list[Job]]:
    """What is compiled for a target: calls with bars, and calls without."""
    if target.platform == "cuda":
        barred, others = hopper_cases(quick=quick)
        each, other = hopper_call, hopper_call
    else:
        barred = [
            Case(linear=linear, rows=rows, held=HELD[name])
            for linear in (SQUARE, WIDE)
            for name in FORMATS
            for rows in (DECODE[:1] if quick else DECODE)
        ]
        others = [
            Case(linear=SQUARE, rows=CODES_ROWS, held=HELD[name])
            for name in (CODES[:1] if quick else CODES)
        ]
        each, other = call, codes_call
    return (
        [(each, (case, target.name)) for case in barred],
        [(other, (case, target.name)) for case in others],
    )


def call(case: Case, name: str) -> dict[str, Any]:
    """One entry of `calls`, of a TPU.

    **Raises:** `ValueError` if one of the sides is not compiled.
    """
    target = TARGETS[name]
    x, w = operands(case, "xla")
    plain = jax.ShapeDtypeStruct((case.linear.k, case.linear.n), case.dtype)
    outcomes = {
        OURS: compile_dot(case, BACKEND, target),
        XLA: compile_dot(case, "xla", target),
        PLAIN: compiled(dequantized_dot, (x, w), target),
        BFLOAT16: compiled(dequantized_dot, (x, plain), target),
    }
    row = _row(case, target, outcomes)
    sides, moved = row["sides"], row["sides"][OURS]["hbm_bytes"]
    return {
        **row,
        "xla_bytes_ratio": sides[PLAIN]["hbm_bytes"] / moved,
        "xla_accessed_ratio": sides[PLAIN]["accessed_bytes"] / moved,
        "bfloat16_ratio": sides[BFLOAT16]["scheduled_seconds"] / row["scheduled_seconds"],
    }


def codes_call(case: Case, name: str) -> dict[str, Any]:
    """One entry of `others`, of a TPU.

    **Raises:** `ValueError` if one of the sides is not compiled.
    """
    target = TARGETS[name]
    backends = {OURS: BACKEND, XLA: "xla"}
    outcomes = {side: compile_dot(case, by, target) for side, by in backends.items()}
    return _row(case, target, outcomes, unknown=(XLA,))


def _row(
    case: Case, target: Target, outcomes: dict[str, Outcome], *, unknown: Sequence[str] = ()
) -> dict[str, Any]:
    """`unknown`: sides whose schedule may have loops of unknown turns, counted once."""
    sides = {
        name: _side(name, outcome, target, name in unknown) for name, outcome in outcomes.items()
    }
    ours = outcomes[OURS].figures
    assert ours is not None and ours.cycles is not None
    needed = needed_bytes(case)
    bound = needed / target.hbm_bytes_per_second
    compute, every_step, memory = part_seconds(ours, target)
    scheduled = max(compute, memory)
    xla = [sides[name] for name in (XLA, PLAIN) if name in sides]
    return {
        "target": target.name,
        "k": case.linear.k,
        "n": case.linear.n,
        "held": case.held.name,
        "rows": case.rows,
        "needed_bytes": needed,
        "bound_seconds": bound,
        "step": ours.cycles.step,
        "steps": ours.cycles.steps,
        "set_up": ours.cycles.set_up,
        "spills": ours.cycles.spills,
        "vmem_bytes": ours.vmem_bytes,
        "compute_seconds": compute,
        "compute_bound_seconds": every_step,
        "memory_seconds": memory,
        "scheduled_seconds": scheduled,
        "first_seconds": ours.first_bytes / target.hbm_bytes_per_second,
        "sides": sides,
        "scheduled_ratio": scheduled / bound,
        "bytes_ratio": ours.hbm_bytes / needed,
        "xla_ratio": min(side["scheduled_seconds"] for side in xla) / scheduled,
    }


def _side(name: str, outcome: Outcome, target: Target, unknown: bool) -> dict[str, Any]:
    if outcome.status is not Status.COMPILED:
        raise ValueError(f"{name} was {outcome.status.value} for {target.name}: {outcome.reason}")
    figures = outcome.figures
    assert figures is not None
    if not figures.known and not unknown:
        raise ValueError(f"The schedule of {name} for {target.name} has a loop of unknown turns.")
    compute, _, memory = part_seconds(figures, target)
    return {
        "hbm_bytes": figures.hbm_bytes,
        "on_chip_bytes": figures.on_chip_bytes,
        "accessed_bytes": figures.accessed_bytes,
        "compute_seconds": compute,
        "scheduled_seconds": max(compute, memory),
        "known": figures.known,
    }


def bars(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """For each bar, how many calls it is for and how many hold it."""
    int4 = [row for row in rows if row["held"].startswith("int4")]
    wanted = {
        "scheduled_ratio": [row["scheduled_ratio"] <= SCHEDULED for row in rows],
        "bytes_ratio": [row["bytes_ratio"] <= MOVED for row in rows],
        "xla_bytes_ratio": [row["xla_bytes_ratio"] >= BYTES_AGAINST_XLA for row in int4],
        "xla_accessed_ratio": [row["xla_accessed_ratio"] >= BYTES_AGAINST_XLA for row in int4],
        "bfloat16_ratio": [row["bfloat16_ratio"] >= TIME_AGAINST_BFLOAT16 for row in int4],
    }
    return {name: {"held": sum(held), "of": len(held)} for name, held in wanted.items()}


def verdict(target: str, found: dict[str, dict[str, int]]) -> str:
    """The line below a target's tables."""
    texts = {
        "scheduled_ratio": f"scheduled at most {SCHEDULED}x the bytes bound",
        "bytes_ratio": f"bytes at most {MOVED}x those needed",
        "xla_bytes_ratio": f"int4 {BYTES_AGAINST_XLA:g}x fewer bytes than XLA in main memory",
        "xla_accessed_ratio": "by XLA's own count",
        "bfloat16_ratio": f"int4 {TIME_AGAINST_BFLOAT16}x less time than bfloat16",
    }
    parts = [f"{text} {found[name]['held']}/{found[name]['of']}" for name, text in texts.items()]
    barred = "" if target in BARRED else " (no bar here)"
    return f"{target}{barred}: " + "; ".join(parts) + "."


def kernel_table(rows: Sequence[dict[str, Any]]) -> Any:
    """The kernels: bundles, microseconds, and ratios to what must be moved."""
    made = table(
        *(_weight(rows[0]), "rows", "bundles", "spills", "code us", "HBM us", "first", "/bound"),
        *("worst", "/needed"),
        title="kernels: step x steps + once; the longer of code and HBM /bound; bytes /needed",
    )
    for row in rows:
        worst = max(row["compute_bound_seconds"], row["memory_seconds"]) / row["bound_seconds"]
        bundles = f"{row['step']}x{row['steps']}+{row['set_up']}"
        made.add_row(
            *(row["held"], str(row["rows"]), bundles, str(row["spills"])),
            *(f"{1e6 * row[name]:.1f}" for name in ("compute_seconds", "memory_seconds")),
            f"{1e6 * row['first_seconds']:.1f}",
            *(f"{row['scheduled_ratio']:.2f}", f"{worst:.2f}", f"{row['bytes_ratio']:.3f}"),
        )
    return made


def beside_table(rows: Sequence[dict[str, Any]]) -> Any:
    """The kernels beside the other sides: megabytes and microseconds."""
    sides = ("ours", "xla", "plain", "bf16")
    made = table(
        *(_weight(rows[0]), "rows", "MB", *sides[1:], "count", "us", *sides[1:]),
        *("xla /us", "bf16 /us"),
        title="beside XLA: MB of main memory; its own count of plain; microseconds scheduled",
    )
    for row in rows:
        found = [row["sides"][name] for name in (OURS, XLA, PLAIN, BFLOAT16)]
        made.add_row(
            *(row["held"], str(row["rows"])),
            *(f"{1e-6 * side['hbm_bytes']:.0f}" for side in found),
            f"{1e-6 * row['sides'][PLAIN]['accessed_bytes']:.0f}",
            *(f"{1e6 * side['scheduled_seconds']:.0f}" for side in found),
            *(f"{row['xla_ratio']:.2f}", f"{row['bfloat16_ratio']:.2f}"),
        )
    return made


def codes_table(rows: Sequence[dict[str, Any]]) -> Any:
    """Codes by codes: scheduled microseconds of the kernel and of XLA, and the bytes bound."""
    made = table(
        *(_weight(rows[0]), "rows", "us", "xla", "bound"),
        title="codes by codes: microseconds scheduled, activations rounded inside",
    )
    for row in rows:
        xla = row["sides"][XLA]
        made.add_row(
            *(row["held"], str(row["rows"]), f"{1e6 * row['scheduled_seconds']:.1f}"),
            f"{'' if xla['known'] else '>'}{1e6 * xla['scheduled_seconds']:.1f}",
            f"{1e6 * row['bound_seconds']:.1f}",
        )
    return made


def _weight(row: dict[str, Any]) -> str:
    return f"{row['target']} {row['k']}x{row['n']}"
