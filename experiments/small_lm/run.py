"""A small language model in float32, int4 and ternary, and its int4 rows. See README.md."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from training_loop import in_shares, plot_runs, read_metrics

from small_lm.claims import broken
from small_lm.score import FLOAT
from small_lm.settings import CONFIGS, read_run
from small_lm.table import table

HERE = pathlib.Path(__file__).parent

# Trained, those that others start from, or learn from, first; then what is made of the float model.
TRAINED = (
    *("float32", "bitnet", "int4", "float32_subln"),
    *("int4_distilled", "int4_lsq", "asym_qat", "asym_qat_distilled"),
)
CALIBRATED = ("int4_round", "asym_round", "asym_gptq", "asym_awq")
QUICK = ("float32", "int4", "bitnet", "asym_qat_distilled", "asym_round")
CURVES = ("float32", "float32_subln", "int4", "int4_distilled", "bitnet")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=pathlib.Path, help="the whole Bible; see README.md")
    parser.add_argument("--rows", nargs="+", choices=(*TRAINED, *CALIBRATED), metavar="NAME")
    parser.add_argument("--out", type=pathlib.Path, help="default: this folder; quick/ if --quick")
    parser.add_argument(
        "--runs", type=pathlib.Path, help="their folders; default: run/ of the repository"
    )
    parser.add_argument("--devices", type=int, default=1, help="CPU devices to split batches over")
    parser.add_argument("--fsdp", type=int, default=1, help="over how many of them weights are too")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, cores shared")
    parser.add_argument("--quick", action="store_true", help="a smaller model, on the excerpt")
    given = parser.parse_args()
    if given.text is None and not given.quick:
        parser.error("the whole Bible is wanted (README.md says how it is made), or --quick")
    out = given.out or (HERE / "quick" if given.quick else HERE)
    folder = "small_lm_quick" if given.quick else "small_lm"
    runs = given.runs or HERE.parents[1] / "run" / folder
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    every = QUICK if given.quick else (*TRAINED, *CALIBRATED)
    wanted = list(given.rows or every)
    for names in phases(wanted, CONFIGS / "quick" if given.quick else CONFIGS):
        failed = in_shares(names, lambda name, cores: one_row(name, runs, given, cores), given.jobs)
        if failed:
            print(f"{', '.join(failed)} failed; what is done is kept in {runs}", file=sys.stderr)
            return 1
    rows = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name in every
        if (file := runs / name / "row.json").exists()
    }
    result = {
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", "numpy")},
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "rows": list(rows.values()),
    }
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(list(rows.values())))
    curves = {n: read_metrics(runs / n / "metrics.jsonl") for n in CURVES if n in rows}
    title = "loss on batches (thin) and on held-out books"
    plot_runs(curves, out / "curves.png", score="held_out", title=title)
    said = broken(rows, quick=given.quick)
    print("The claim does not hold:" if said else "the claim holds", *said, sep="\n  ")
    print(f"written to {out}, {time.perf_counter() - start:.0f} s")
    return 1 if said else 0


def phases(names: list[str], configs: pathlib.Path) -> list[list[str]]:
    """The rows in groups; those of one need none of the same or of later ones."""
    made: list[list[str]] = []
    needs = {n: {FLOAT} if n in CALIBRATED else {*read_run(n, configs).needs} for n in names}
    left = list(names)
    while left:
        ready = [name for name in left if not needs[name] & {*left}]
        made.append(ready)
        left = [name for name in left if name not in ready]
    # Rows that were made before there was a float model to compare them with are scored again.
    again = [name for name in made[0] if name != FLOAT] if FLOAT in names else []
    return [*made, again]


def one_row(name: str, runs: pathlib.Path, given: argparse.Namespace, cores: list[int]) -> bool:
    """Trains or calibrates one row in a process of its own. What is finished is only scored."""
    print(f"{name} on {len(cores)} cores", flush=True)
    script = "ptq.py" if name in CALIBRATED else "one_run.py"
    command = [sys.executable, str(HERE / script), name, "--out", str(runs.resolve())]
    if given.text is not None:
        command += ["--text", str(given.text.resolve())]
    if given.quick:
        command += ["--configs", str(CONFIGS / "quick")]
    if script == "one_run.py" and given.devices > 1:
        command += ["--devices", str(given.devices), "--fsdp", str(given.fsdp)]
    command += ["--cores", *map(str, cores)]
    return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
