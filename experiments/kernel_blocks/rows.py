"""Up to how many rows kernels for TPU are scheduled to be faster than XLA's programs.

    python experiments/kernel_blocks/rows.py --target v5e v6e

prints, for each format and number of rows, microseconds of the kernel and of the faster of XLA's
two programs (that of our dispatch, and a plain dequantize and dot), and the most rows up to which
the kernel is ahead. `_MOST_ROWS` in `_mosaic_tpu_tables.py` is taken from it.
"""

import argparse
import json
import pathlib
from typing import Any

from jaxquant.aot import Target, TARGETS
from jaxquant.cli._compiled_dot import (
    compile_dot,
    compiled,
    dequantized_dot,
    on_cpu,
    operands,
    Outcome,
    part_seconds,
)
from jaxquant.ops.dot._cases import Case, HELD, linear_of

FORMATS = (
    *("int8", "e4m3", "int4 g128", "int4 g128 zero", "int4 g32", "int3 g64"),
    *("int2 g64", "nf4 g64", "mxfp4"),
)


def seconds(outcome: Outcome, target: Target) -> float | None:
    """The longer of bundles and bytes; None if not compiled."""
    if outcome.figures is None or not outcome.figures.known:
        return None
    code, _, memory = part_seconds(outcome.figures, target)
    return max(code, memory)


def row_of(case: Case, target: Target) -> dict[str, Any]:
    """The kernel and XLA's programs for one case."""
    kernel = seconds(compile_dot(case, "mosaic_tpu", target), target)
    others = (
        compile_dot(case, "xla", target),
        compiled(dequantized_dot, operands(case, "xla"), target),
    )
    xla = [found for found in (seconds(each, target) for each in others) if found is not None]
    return {
        "target": target.name,
        "held": case.held.name,
        "rows": case.rows,
        "weight": str(case.linear),
        "kernel_seconds": kernel,
        "xla_seconds": min(xla, default=None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", default=["v4", "v5e", "v5p", "v6e", "7x"])
    parser.add_argument("--held", nargs="+", default=list(FORMATS), choices=HELD)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 64, 128, 256])
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    on_cpu()
    found = []
    for name in arguments.target:
        for held in arguments.held:
            most = 0
            for rows in sorted(arguments.rows):
                case = Case(linear=linear_of(4096, 4096), rows=rows, held=HELD[held])
                row = row_of(case, TARGETS[name])
                found.append(row)
                kernel, xla = row["kernel_seconds"], row["xla_seconds"]
                if kernel is None or xla is None:
                    print(f"{name} {held} {rows}: not compiled: {row}", flush=True)
                    continue
                print(
                    f"{name:>4} {held:>14} {rows:>4} rows: {1e6 * kernel:7.1f} us, XLA "
                    f"{1e6 * xla:7.1f} us, {xla / kernel:5.2f}",
                    flush=True,
                )
                most = rows if kernel <= xla else most
            print(f"{name:>4} {held:>14} up to {most} rows", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
