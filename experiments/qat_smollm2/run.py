"""SmolLM2 trained in few bits, beside rounding and GPTQ; and QLoRA. See README.md."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from training_loop import plot_runs, read_metrics

from qat_smollm2.claims import broken
from qat_smollm2.rows import FULL, QUICK, ROWS, TRAINED
from qat_smollm2.table import everything

HERE = pathlib.Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, what in (("tokens", "trained and calibrated with"), ("evaluation", "scored")):
        text = f".npz of tokens [windows, length] that are {what}; default: a part of the excerpt"
        parser.add_argument(f"--{name}", type=pathlib.Path, help=text)
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--steps", type=int, help="of each training, in place of its settings'")
    parser.add_argument("--out", type=pathlib.Path, help="default: this folder; quick/ if --quick")
    parser.add_argument(
        "--runs",
        type=pathlib.Path,
        help="their folders; default: run/qat_smollm2 of the repository",
    )
    parser.add_argument("--quick", action="store_true", help="3 layers, a few steps, short windows")
    parser.add_argument("--again", action="store_true", help="also rows that are there already")
    given = parser.parse_args()
    out = given.out or (HERE / "quick" if given.quick else HERE)
    own = out / "runs" if given.quick or given.out else HERE.parents[1] / "run" / "qat_smollm2"
    runs = given.runs or own
    runs.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    setting = {
        "tokens": None if given.tokens is None else given.tokens.name,
        "evaluation": None if given.evaluation is None else given.evaluation.name,
        "quick": given.quick,
    }
    check_setting(runs, setting, given.again)
    every = QUICK if given.quick else FULL
    wanted = [name for name in ROWS if name in given.rows] if given.rows else every
    for number, name in enumerate(wanted, 1):
        file = runs / name / "row.json"
        # A quick run is a check of the code as it is.
        if file.exists() and not (given.again or given.quick):
            continue
        passed = time.perf_counter() - begun
        print(f"[{number}/{len(wanted)}, {passed:.0f} s] {name}", flush=True)
        if given.quick or given.again:
            forget(runs / name)
        if not one_row(name, runs, given):
            print(f"{name} failed; what is done is kept in {runs}", file=sys.stderr)
            return 1
    rows = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name in ROWS
        if (file := runs / name / "row.json").exists()
    }
    result = {
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", "numpy")},
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        **setting,
        "rows": list(rows.values()),
    }
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(everything(rows))
    curves = {n: read_metrics(runs / n / "metrics.jsonl") for n in TRAINED if n in rows}
    if curves:
        title = "loss on batches (thin) and NLL of windows that no step sees"
        plot_runs(curves, out / "curves.png", score="monitored", title=title)
    said = broken(rows, quick=given.quick)
    print("The claim does not hold:" if said else "the claim holds", *said, sep="\n  ")
    print(f"written to {out}, {time.perf_counter() - begun:.0f} s")
    return 1 if said else 0


def check_setting(runs: pathlib.Path, setting: dict[str, Any], again: bool) -> None:
    """Rows of one folder are of one setting, so that they can stand in one table."""
    file = runs / "setting.json"
    if file.exists() and not again and (held := json.loads(file.read_text())) != setting:
        sys.exit(
            f"The rows in {runs} are of another setting: {held}, and not {setting}. Give --runs "
            "another folder, or --again to replace them."
        )
    file.write_text(json.dumps(setting, indent=1) + "\n", encoding="utf-8")


def forget(folder: pathlib.Path) -> None:
    """Removes what an earlier run of a row left, which training would go on from."""
    for path in sorted(folder.rglob("*"), reverse=True) if folder.exists() else ():
        path.rmdir() if path.is_dir() else path.unlink()


def one_row(name: str, runs: pathlib.Path, given: argparse.Namespace) -> bool:
    """Makes a row in a process of its own, so that its memory is its own."""
    command = [sys.executable, str(HERE / "one_row.py"), name, "--runs", str(runs.resolve())]
    for option in ("tokens", "evaluation"):
        if (path := getattr(given, option)) is not None:
            command += [f"--{option}", str(path.resolve())]
    if given.steps is not None:
        command += ["--steps", str(given.steps)]
    if given.quick:
        command.append("--quick")
    # As the command line of jaxquant has it: see jaxquant/cli/__init__.py.
    environment = {"OPENBLAS_THREAD_TIMEOUT": "4", **os.environ}
    return subprocess.run(command, env=environment, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
