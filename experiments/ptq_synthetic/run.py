"""Calibrated quantization of one matrix, on data with published figures. See README.md."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from typing import Any

import jax

HERE = pathlib.Path(__file__).parent
MODULES = ("gptq_anchor", "awq_anchor", "smooth_anchor", "llm_int8_anchor")
"""Each has `SEEDS`, `rows()` and, where more than figures must hold, `failures(rows, slack)`."""
MARGIN = 0.10
"""Ours over the published figure: medians over seeds, of data made by a description of theirs."""
QUICK_MARGIN = 0.60
"""The same with one seed instead of several; single seeds lie up to half above the median."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed; writes elsewhere")
    parser.add_argument("--only", choices=MODULES, help="one algorithm; writes elsewhere")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    margin = QUICK_MARGIN if arguments.quick else MARGIN
    start = time.perf_counter()
    for name in (arguments.only,) if arguments.only else present():
        module: Any = importlib.import_module(name)
        if arguments.quick:
            module.SEEDS = module.SEEDS[:1]
        new = [{"anchors": name.removesuffix("_anchor"), **row} for row in module.rows()]
        print(table(new), flush=True)
        found += new
        wrong += [said(row) for row in new if is_over(row, margin)]
        if hasattr(module, "failures"):
            wrong += module.failures(new, 1 + margin if arguments.quick else 1.0)
    elsewhere = arguments.quick or arguments.only
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ptq_synthetic-")) if elsewhere else HERE
    result = {
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "numpy")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}",
        "seconds": round(time.perf_counter() - start, 1),
        "rows": found,
    }
    path = folder / "results.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}, {result['seconds']} s")
    if wrong:
        print("The claim does not hold:", *wrong, sep="\n  ")
        sys.exit(1)


def present() -> list[str]:
    """The modules of the list, all of which are here."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not built: {', '.join(missing)}")
    return [name for name in MODULES if name not in missing]


def is_over(row: dict[str, Any], margin: float) -> bool:
    """Whether one of our figures is worse than the published one, past the margin."""
    return bool(row.get("ours", True) and row["ratio"] is not None and row["ratio"] > 1 + margin)


def said(row: dict[str, Any]) -> str:
    return f"{row['method']}, {row['case']}: {row['ratio']:.2f} of the published figure"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | case | ours | over seeds | published | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{row['lowest']:.3g} to {row['highest']:.3g}" if "lowest" in row else ""
        anchor = "" if row["anchor"] is None else f"{row['anchor']:.3g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        cells = (row["method"], row["case"], f"{row['value']:.3g}", spread, anchor, ratio)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
