"""`jaxquant bench compile-matrix`: every kernel, format and case, for chips that are not here."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ..aot import Target, TARGETS
from ..ops.dot import KERNELS
from ..ops.dot._cases import Case, CASES, cut_down, HELD, SQUARE
from ._compiled_dot import compile_dot, needed_bytes, Outcome, part_seconds, run_jobs, Status
from ._console import bar, check_json, say, show, table, write_json

_QUICK_ROWS = 16


def run_matrix(arguments: argparse.Namespace) -> None:
    """The command. Its JSON: `bench`, `failed` (a count), and `cases`, one for each call, with

    - `target`, `kernel`, `held`, `k`, `n`, `rows`, `dtype`: which call;
    - `status`: `compiled`, `refused` (by the kernel) or `FAILED` (by the compiler), and `reason`,
      `compile_seconds`;
    - where it was compiled: `needed_bytes`, `hbm_bytes`, `vmem_bytes`; with a schedule also `step`
      (bundles of one step), `steps`, `set_up`, `spills`, `compute_seconds`, `memory_seconds`,
      `scheduled_seconds` (the longer of the two); of a GPU `kernels` instead: of each what its PTX
      and ptxas tell (`aot.CudaKernel`), and how many `blocks` a multiprocessor holds.

    **Raises:** `SystemExit` with 1 where a compiler fails on a call that its kernel did not refuse.
    """
    check_json(arguments.json)
    targets = wanted_targets(arguments.target or ["all"])
    cases = quick_cases() if arguments.quick else CASES
    jobs = [
        (_row, (case, kernel, target.name, not arguments.quick))
        for target in targets
        for kernel in KERNELS
        for case in cases
    ]
    with bar("compiling") as progress:
        rows = run_jobs(jobs, arguments.jobs, progress)
    show(matrix_table(rows))
    for line in reasons(rows):
        say(line)
    failed = sum(row["status"] == Status.FAILED.value for row in rows)
    write_json(arguments.json, {"bench": "compile-matrix", "failed": failed, "cases": rows})
    if failed:
        raise SystemExit(1)


def wanted_targets(names: Sequence[str]) -> list[Target]:
    """Targets by name, `all` for every one.

    **Raises:** `ValueError` for a name that none has.
    """
    if "all" in names:
        return list(TARGETS.values())
    for name in names:
        if name not in TARGETS:
            known = ", ".join(TARGETS)
            raise ValueError(f"--target {name} is not known. Known are {known}, and all of them.")
    return [TARGETS[name] for name in dict.fromkeys(names)]


def quick_cases() -> tuple[Case, ...]:
    """One of each format, of a cut-down shape."""
    found = {
        case.held.name: case
        for case in CASES
        if (case.linear, case.rows, case.dtype.name) == (SQUARE, _QUICK_ROWS, "bfloat16")
    }
    return tuple(cut_down(found[name]) for name in HELD)


def _row(case: Case, kernel: str, name: str, schedule: bool) -> dict[str, Any]:
    """One call, compiled: an entry of `cases`."""
    target = TARGETS[name]
    start = time.perf_counter()
    found = compile_dot(case, kernel, target, schedule=schedule)
    row = {
        "target": name,
        "kernel": kernel,
        "held": case.held.name,
        "k": case.linear.k,
        "n": case.linear.n,
        "rows": case.rows,
        "dtype": jnp.dtype(case.dtype).name,
        "status": found.status.value,
        "reason": found.reason,
        "compile_seconds": time.perf_counter() - start,
    }
    return {**row, **_figures(case, found, target)}


def _figures(case: Case, found: Outcome, target: Target) -> dict[str, Any]:
    figures = found.figures
    if figures is None:
        return {}
    row: dict[str, Any] = {
        "needed_bytes": needed_bytes(case),
        "hbm_bytes": figures.hbm_bytes,
        "vmem_bytes": figures.vmem_bytes,
    }
    if figures.kernels:
        row["kernels"] = list(figures.kernels)
    if figures.cycles is not None and figures.known:
        compute, _, memory = part_seconds(figures, target)
        row |= {
            "step": figures.cycles.step,
            "steps": figures.cycles.steps,
            "set_up": figures.cycles.set_up,
            "spills": figures.cycles.spills,
            "compute_seconds": compute,
            "memory_seconds": memory,
            "scheduled_seconds": max(compute, memory),
        }
    return row


def matrix_table(rows: Sequence[dict[str, Any]]) -> Any:
    """A line for each kernel and format; for each target how many calls were compiled, of how many.

    `!` marks calls that failed.
    """
    targets = list(dict.fromkeys(row["target"] for row in rows))
    made = table("kernel", "format", *targets)
    for kernel, held in dict.fromkeys((row["kernel"], row["held"]) for row in rows):
        cells = []
        for target in targets:
            own = [
                row["status"]
                for row in rows
                if (row["kernel"], row["held"], row["target"]) == (kernel, held, target)
            ]
            failed = own.count(Status.FAILED.value)
            mark = f" {failed}!" if failed else ""
            cells.append(f"{own.count(Status.COMPILED.value)}/{len(own)}{mark}")
        made.add_row(kernel, held, *cells)
    return made


def reasons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why calls were refused or failed: each reason once, with how many have it and one of them."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] != Status.COMPILED.value:
            found.setdefault((row["status"], row["reason"]), []).append(row)
    return [
        f"{status}, {len(own)}, as {_call(own[0])}: {reason}"
        for (status, reason), own in sorted(found.items())
    ]


def _call(row: dict[str, Any]) -> str:
    return (
        f"{row['held']} {row['rows']}x{row['k']}x{row['n']} {row['dtype']} by {row['kernel']} "
        f"for {row['target']}"
    )
