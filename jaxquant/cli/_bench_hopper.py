"""`jaxquant bench kernels --target h100`: what ptxas makes of the kernels for decoding."""

import re
from collections.abc import Sequence
from typing import Any

from ..aot import Target, TARGETS
from ..ops.dot._cases import Case, DECODE, HELD, Linear, SHAPES, SQUARE, WIDE
from ._compiled_dot import (
    compile_dot,
    compiled,
    dequantized_dot,
    Figures,
    needed_bytes,
    operands,
    Outcome,
    Status,
)
from ._console import table

FORMATS = ("int4 g128", "int4 g128 zero", "int8")
OTHERS = ("nf4 g64", "w8a8 int8", "w8a8 e4m3", "w8a8 e4m3 block")
"""No bar is for these: looked up, and codes by codes."""
OTHER_ROWS = (16, 64)
KERNEL, XLA, PLAIN = "kernel", "xla", "dequantize, dot"
BACKEND = "triton_gpu"
OWN_NAMES = ("weight_only_", "int8_by_int8", "fp8_by_fp8")
"""How the kernels of `_triton_gpu*.py` are called; what else a program runs is XLA's."""

WIDEST_LOAD, BLOCKS = 16, 2
"""The bars: bytes that a thread gets by a load of codes, and blocks that a multiprocessor holds."""
_CODES = "1"
"""Which argument of the kernels holds the codes of the weight."""


def hopper_cases(*, quick: bool) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The decode calls that bars are for, and calls of other kernels.

    Every linear of the cases whose `k` has whole groups; `quick`: one of them, and one row.
    """
    linears, rows = ((SQUARE,), DECODE[:1]) if quick else (SHAPES, DECODE)
    barred = [
        Case(linear=linear, rows=row, held=HELD[name])
        for linear in linears
        for name in FORMATS
        if _whole_groups(linear, name)
        for row in rows
    ]
    others = [
        Case(linear=SQUARE, rows=row, held=HELD[name])
        for name in OTHERS
        for row in (OTHER_ROWS[:1] if quick else OTHER_ROWS)
    ]
    return tuple(barred), tuple(others)


def _whole_groups(linear: Linear, name: str) -> bool:
    group = HELD[name].weights.tile.contracted
    return group is None or linear.k % group == 0


def hopper_call(case: Case, name: str) -> dict[str, Any]:
    """One entry of `calls` or `others`: see `run_kernels`.

    **Raises:** `ValueError` if one of the sides is not compiled, or has no kernel of ours.
    """
    target = TARGETS[name]
    ours = _figures(KERNEL, compile_dot(case, BACKEND, target), target)
    found = [kernel for kernel in ours.kernels if kernel["name"].startswith(OWN_NAMES)]
    if len(found) != 1:
        names = [kernel["name"] for kernel in ours.kernels]
        raise ValueError(
            f"A program of {BACKEND} has one kernel named like {', '.join(OWN_NAMES)}; that for "
            f"{case.rows} rows by {case.linear} of {case.held.name} has {names}."
        )
    needed = needed_bytes(case)
    row = {
        "target": name,
        "k": case.linear.k,
        "n": case.linear.n,
        "held": case.held.name,
        "rows": case.rows,
        "needed_bytes": needed,
        "bound_seconds": needed / target.hbm_bytes_per_second,
        **facts(found[0]),
        "splits": found[0]["grid"][1],
        "spills": sum(kernel["spill_bytes"] for kernel in ours.kernels),
    }
    sides = {KERNEL: ours}
    if case.linear in (SQUARE, WIDE):
        sides[XLA] = _figures(XLA, compile_dot(case, "xla", target), target)
        if case.held.activations is None:
            outcome = compiled(dequantized_dot, operands(case, "xla"), target)
            sides[PLAIN] = _figures(PLAIN, outcome, target)
    return {**row, "sides": {side: _side(figures) for side, figures in sides.items()}}


def _figures(side: str, outcome: Outcome, target: Target) -> Figures:
    if outcome.status is not Status.COMPILED or outcome.figures is None:
        raise ValueError(f"{side} was {outcome.status.value} for {target.name}: {outcome.reason}")
    return outcome.figures


def facts(kernel: dict[str, Any]) -> dict[str, Any]:
    """What a kernel of ours is held to, of one that is launched.

    Where the compiler unrolled every loop, what stood in one stands outside: `unrolled` says so,
    and `matrix` and `code_loads` are then those of the whole kernel, else those in loops.
    """
    unrolled = kernel["loops"] == 0
    loads = kernel["loads_of" if unrolled else "loads_of_in_loops"]
    kept = ("grid", "threads", "registers", "shared_bytes", "blocks", "warnings")
    return {
        **{name: kernel[name] for name in kept},
        "unrolled": unrolled,
        "matrix": kernel["matrix" if unrolled else "matrix_in_loops"],
        "code_loads": loads.get(_CODES, {}),
    }


def _side(figures: Figures) -> dict[str, Any]:
    return {
        "hbm_bytes": figures.hbm_bytes,
        "temporary_bytes": figures.temporary_bytes,
        "library_calls": dict(figures.library_calls),
        "kernels": list(figures.kernels),
    }


def hopper_bars(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """For each bar, how many calls it is for, how many hold it, and of these unrolled ones."""
    wanted = {
        "no_spills": lambda row: row["spills"] == 0,
        "matrix_in_loop": lambda row: bool(row["matrix"]),
        "wide_loads": lambda row: set(row["code_loads"]) == {str(WIDEST_LOAD)},
        "blocks": lambda row: row["blocks"] >= BLOCKS,
    }
    found = {}
    for name, holds in wanted.items():
        held = [row for row in rows if holds(row)]
        unrolled = sum(row["unrolled"] for row in held)
        found[name] = {"held": len(held), "of": len(rows), "unrolled": unrolled}
    return found


def hopper_verdict(target: str, found: dict[str, dict[str, int]]) -> str:
    """The line below a target's tables."""
    texts = {
        "no_spills": "no spills",
        "matrix_in_loop": "tensor-core instructions in the loop",
        "wide_loads": f"{WIDEST_LOAD}-byte loads of codes",
        "blocks": f"at least {BLOCKS} blocks a multiprocessor",
    }
    parts = [f"{text} {found[name]['held']}/{found[name]['of']}" for name, text in texts.items()]
    unrolled = found["matrix_in_loop"]["unrolled"]
    return f"{target}: {'; '.join(parts)}. Of {unrolled} the loop is unrolled."


def hopper_table(rows: Sequence[dict[str, Any]]) -> Any:
    """Calls of one weight and format: a line for each kernel of ours, and for those beside it."""
    first = rows[0]
    made = table(
        *("rows", "by", "grid", "regs", "spills", "KB", "blocks", "tensor cores", "loads", "MB"),
        "/needed",
        title=f"{first['target']} {first['k']}x{first['n']} {first['held']}",
    )
    for row in rows:
        for side, figures in row["sides"].items():
            shown = row if side == KERNEL else _matmul(figures["kernels"])
            made.add_row(
                *(str(row["rows"]), _SHORT.get(side, side), *_cells(shown, figures)),
                f"{1e-6 * figures['temporary_bytes']:.1f}",
                f"{figures['hbm_bytes'] / row['needed_bytes']:.2f}",
            )
    return made


LEGEND = (
    "Tensor-core instructions and loads (how many x bytes of a thread; ours: of codes) are those "
    "in the loop, * where it is unrolled; spills those of all kernels of the program, in bytes; MB "
    "of temporaries; /needed: bytes that cross between kernels and main memory or its cache."
)
_SHORT = {PLAIN: "plain"}


def _cells(shown: dict[str, Any] | None, figures: dict[str, Any]) -> list[str]:
    spills = str(sum(kernel["spill_bytes"] for kernel in figures["kernels"]))
    if shown is None:
        called = ", ".join(figures["library_calls"]) or "none"
        return ["", "", spills, "", "", called, ""]
    *grid, last = shown["grid"]
    return [
        "x".join(map(str, grid if last == 1 else (*grid, last))),
        str(shown["registers"]),
        spills,
        f"{shown['shared_bytes'] / 1024:.0f}",
        str(shown["blocks"]),
        matrix_text(shown["matrix"]) + "*" * shown["unrolled"],
        " ".join(f"{count}x{size}" for size, count in shown["code_loads"].items()),
    ]


def _matmul(kernels: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The kernel of XLA's that has the most tensor-core instructions, if one has any."""
    found = [kernel for kernel in kernels if kernel["matrix"]]
    if not found:
        return None
    kernel = max(found, key=lambda kernel: sum(kernel["matrix"].values()))
    unrolled = kernel["loops"] == 0
    return {
        **facts(kernel),
        "code_loads": kernel["loads" if unrolled else "loads_in_loops"],
    }


def matrix_text(matrix: dict[str, int]) -> str:
    """`8 wgmma m64n16k16 bf16`: how many instructions, their unit, shape and operands' type."""
    texts: dict[str, int] = {}
    for kind, count in matrix.items():
        shape, *types = re.findall(r"\.([a-z]+\d\w*)", kind)
        # The type of the sums comes first, or (mma.sync) first and last.
        text = f"{kind.partition('.')[0]} {shape} {types[1]}"
        texts[text] = texts.get(text, 0) + count
    return ", ".join(f"{count} {text}" for text, count in texts.items())
