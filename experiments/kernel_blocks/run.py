"""Which blocks a kernel for TPU is scheduled best with, by compiling it with each of them.

    python experiments/kernel_blocks/run.py --target v5e --held "int4 g128" --rows 16 64

prints a line for each choice of blocks (bundles of all steps, the set-up once, beside the cycles
that the bytes take) and marks those that the project's heuristics take with `<`.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from jaxquant.aot import mesh_for, Target, TARGETS
from jaxquant.cli._compiled_dot import compiled, on_cpu, operands, part_seconds
from jaxquant.ops._target import target_device
from jaxquant.ops.dot import _mosaic_tpu as backend
from jaxquant.ops.dot._cases import Case, HELD, Linear
from jaxquant.ops.dot._mosaic_tpu_blocks import blocks_for
from jaxquant.ops.dot._mosaic_tpu_weight import Blocks, Weight, weight_product


def product(x: Any, w: Any, weight: Weight, blocks: Blocks) -> Any:
    """The kernel's product with given blocks."""
    return weight_product(
        x,
        w.codes,
        backend._plain_scale(w),
        backend._plain_zero_point(w),
        None,
        weight=weight,
        blocks=blocks,
        out_dtype=x.dtype,
    )


def choices(weight: Weight, usual: Blocks, wide: tuple[int, ...], others: bool) -> Iterator[Blocks]:
    """Blocks beside the usual ones: other widths and parts of columns; `others`: units, lengths."""
    least = weight.decoder.least_columns
    widths = sorted({min(n, weight.n) for n in wide if n % least == 0})
    units = {usual.unit} | ({256} if others and weight.k % 256 == 0 else set())
    lengths = {usual.k} | {k for k in (2048, 7168) if others and weight.k % k == 0 and k < weight.k}
    for k, n, unit in itertools.product(sorted(lengths), widths, sorted(units)):
        for columns in sorted({c for c in (128, 256, 512, n) if n % c == 0 and c % least == 0}):
            cores = usual.cores if -(-weight.n // n) % usual.cores == 0 else 1
            yield dataclasses.replace(usual, k=k, n=n, unit=unit, columns=columns, cores=cores)


def rows_of(
    case: Case, target: Target, wide: tuple[int, ...], others: bool
) -> Iterator[dict[str, Any]]:
    """A row for each choice of blocks."""
    x, w = operands(case, "mosaic_tpu")
    with jax.set_mesh(mesh_for(target)):
        device = target_device()
    decoder = backend._decoder(w, device.tpu_generation)
    assert not isinstance(decoder, str), decoder
    weight = backend._weight(w, decoder)
    usual = blocks_for(case.rows, weight, w.scheme.values.bits, target.cores)
    assert not isinstance(usual, str), usual
    tried = dict.fromkeys([usual, *choices(weight, usual, wide, others)])
    for blocks in tried:
        fn = functools.partial(product, weight=weight, blocks=blocks)
        found = compiled(fn, (x, w), target)
        row = {"target": target.name, "held": case.held.name, "rows": case.rows}
        row |= {"weight": str(case.linear), "blocks": dataclasses.asdict(blocks)}
        row |= {"usual": blocks == usual, "reason": found.reason}
        if found.figures is not None and found.figures.cycles is not None:
            code, _, memory = part_seconds(found.figures, target)
            cycles = found.figures.cycles
            row |= {"cycles": cycles.exact, "memory_cycles": round(memory * target.clock_hz)}
            row |= {"step": cycles.step, "set_up": cycles.set_up, "spills": cycles.spills}
            row |= {
                "first_cycles": round(
                    found.figures.first_bytes / target.hbm_bytes_per_second * target.clock_hz
                )
            }
        yield row


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    blocks = row["blocks"]
    chosen = f"{blocks['k']:>6}x{blocks['n']:<5} by {blocks['unit']:>3}x{blocks['columns']:<5}"
    head = f"{row['target']:>4} {row['held']:>14} {row['weight']:>11} {row['rows']:>4} {chosen}"
    if "cycles" not in row:
        return f"{head} {row['reason'][:120]}"
    ratio = max(row["cycles"], row["memory_cycles"]) / row["memory_cycles"]
    return (
        f"{head} {row['cycles']:>7} / {row['memory_cycles']:<7} {ratio:5.2f} first "
        f"{row['first_cycles']:>5} spills {row['spills']:>5}{' <' if row['usual'] else ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", default=["v5e", "v6e"], choices=TARGETS)
    parser.add_argument("--held", nargs="+", default=["int4 g128", "int4 g128 zero"], choices=HELD)
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--weight", nargs="+", default=["4096x4096"], help="KxN")
    parser.add_argument("--wide", nargs="+", type=int, default=[256, 512, 1024])
    parser.add_argument("--others", action="store_true", help="other units and lengths too")
    parser.add_argument("--json", type=pathlib.Path, help="default: results.json beside this file")
    parser.add_argument("--quick", action="store_true", help="one target, format and width")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.target, arguments.held, arguments.rows = ["v5e"], ["int4 g128"], [16]
        arguments.wide = [512]
    on_cpu()
    found = []
    for name, held, text, rows in itertools.product(
        arguments.target, arguments.held, arguments.weight, arguments.rows
    ):
        k, n = map(int, text.split("x"))
        linear = Linear(model="", part="", k=k, n=n)
        case = Case(linear=linear, rows=rows, held=HELD[held])
        for row in rows_of(case, TARGETS[name], tuple(arguments.wide), arguments.others):
            print(line(row), flush=True)
            found.append(row)
    path = arguments.json or pathlib.Path(__file__).with_name("results.json")
    if not arguments.quick or arguments.json is not None:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
