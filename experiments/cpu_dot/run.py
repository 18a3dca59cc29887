"""How fast a CPU multiplies by quantized weights, form by form. See README.md."""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from nan_rows import nan_rows
from sides import FLOAT_SIDES, has_peer, PEER, sides, weights_of

from jaxquant.evaluate import medians

HERE = pathlib.Path(__file__).parent
SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576), (4096, 14336))
"""[k, n]: the layers of SmolLM2-135M, and an MLP of an 8-billion-parameter Llama."""
ROWS = (1, 8, 64, 512)
LEAST_ROUNDS = 15
# (rows, shape, side, times as fast as the better order of float32). What is measured lies well
# above; the margin is for a busy machine.
CLAIMS = (
    (1, (4096, 14336), "w8a16, prepared", 1.15),
    (512, (576, 1536), "w8a8, prepared", 1.5),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS)
    parser.add_argument("--again", action="store_true", help="measure what results.json has too")
    parser.add_argument("--quick", action="store_true", help="only the claims; writes elsewhere")
    parser.add_argument("--out", type=pathlib.Path, help="default: results.json beside this file")
    arguments = parser.parse_args()
    if arguments.out is None:
        folder = pathlib.Path(tempfile.mkdtemp()) if arguments.quick else HERE
        arguments.out = folder / "results.json"
    return arguments


def cell(shape: tuple[int, int], rows: int, rounds: int, wanted: Any) -> dict[str, Any]:
    """Every side of one product, taking turns."""
    start = time.perf_counter()
    x = jax.random.normal(jax.random.key(1), (rows, shape[0]))
    weights = weights_of(shape)
    made = sides(x, weights, wanted)
    timings = medians({side.name: side.run(x) for side in made}, rounds=rounds)
    best = min((timings[name] for name in FLOAT_SIDES), key=lambda timing: timing.median)
    exact = np.asarray(x, np.float64) @ np.asarray(weights[0], np.float64)
    measured = {}
    for side in made:
        timing = timings[side.name]
        measured[side.name] = {
            "backend": side.backend,
            "median_us": round(1e6 * timing.median / len(weights), 2),
            "ratio": round(timing.ratio(best), 3),
            # Of the quantization, not of the arithmetic: that all sides compute one and the same.
            "error": float(f"{np.abs(side.first(x) - exact).max() / np.abs(exact).max():.2g}"),
            **({"note": side.note} if side.note else {}),
        }
    return {
        "shape": list(shape),
        "rows": rows,
        "weights": len(weights),
        "rounds": rounds,
        "seconds": round(time.perf_counter() - start, 1),
        "sides": measured,
    }


def show(measured: dict[str, Any]) -> None:
    k, n = measured["shape"]
    print(f"{measured['rows']} rows, {k}x{n}  ({measured['seconds']:.0f} s)")
    for name, side in measured["sides"].items():
        print(
            f"  {name:22} {side['backend']:8} {side['median_us']:11.1f} us"
            f"  {side['ratio']:6.2f} x float32   error {side['error']:.1g}",
            flush=True,
        )


def summary(cells: dict[str, Any]) -> str:
    """Speed over float32: a line for each side, a column for each cell."""
    names = list(dict.fromkeys(name for c in cells.values() for name in c["sides"]))
    lines = ["| side | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
    for name in names:
        ratios = (c["sides"].get(name, {}).get("ratio") for c in cells.values())
        lines.append(
            f"| {name} | " + " | ".join("" if r is None else f"{r:.2f}" for r in ratios) + " |"
        )
    return "\n".join(lines)


def failures(cells: dict[str, Any], nans: list[dict[str, Any]]) -> list[str]:
    """Claims that were measured and do not hold."""
    found = [
        f"with {row['rows']} rows {name} does not pass a NaN on"
        for row in nans
        for name in ("w8a16", "w8a8")
        if not row[name]
    ]
    for rows, shape, name, least in CLAIMS:
        measured = cells.get(key_of(shape, rows))
        if measured is not None and measured["sides"][name]["ratio"] < least:
            ratio = measured["sides"][name]["ratio"]
            found.append(f"{name}, {key_of(shape, rows)}: {ratio} x float32, not {least}")
    return found


def key_of(shape: tuple[int, int], rows: int) -> str:
    return f"{rows} x {shape[0]}x{shape[1]}"


def main() -> int:
    arguments = parse_arguments()
    machine = {
        "device": jax.devices()[0].device_kind,
        "cpus": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "peer": PEER if has_peer() else f"{PEER} is not installed",
    }
    results: dict[str, Any] = {"machine": machine, "cells": {}}
    if arguments.out.is_file() and not arguments.again:
        # Each cell is measured in one go, so an interrupted run goes on with the next.
        before = json.loads(arguments.out.read_text(encoding="utf-8"))
        if before["machine"] == machine:
            results = before
    wanted = [(tuple(map(int, s.split("x"))), m) for s in arguments.shapes for m in arguments.rows]
    # Quick: the sides of the claims alone, and what they are compared with.
    named = {*FLOAT_SIDES, *(claim[2] for claim in CLAIMS)} if arguments.quick else None

    def wanted_side(name: str) -> bool:
        return named is None or name in named

    if arguments.quick:
        wanted = [(shape, rows) for rows, shape, _, _ in CLAIMS]
    for shape, rows in wanted:
        key = key_of(shape, rows)
        if key in results["cells"]:
            continue
        measured = cell(shape, rows, arguments.rounds, wanted_side)
        results["cells"][key] = measured
        show(measured)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    results["nan"] = list(nan_rows())
    for row in results["nan"]:
        noticed = ", ".join(f"{k} {'yes' if v else 'NO'}" for k, v in row.items() if k != "rows")
        print(f"NaN in one of {row['rows']} rows is noticed: {noticed}")
    arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(summary(results["cells"]))
    found = failures(results["cells"], results["nan"])
    for line in found:
        print(f"FAILS: {line}")
    print(f"{machine}; written to {arguments.out}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
