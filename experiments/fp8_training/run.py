"""A small language model trained in float32, bfloat16 and five FP8 recipes. See README.md."""

import argparse
import dataclasses
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

from fp8_training.claims import as_table, broken, differences
from fp8_training.settings import ARITHMETIC, CONFIGS

HERE = pathlib.Path(__file__).parent
QUICK = ("bfloat16", "fp8_train_delayed", "fp8_train_current", "fp8_train_block")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=pathlib.Path, help="the whole Bible; see small_lm/README.md")
    parser.add_argument("--arithmetic", nargs="+", choices=ARITHMETIC, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2; 0 with --quick")
    parser.add_argument("--out", type=pathlib.Path, help="default: this folder; quick/ if --quick")
    parser.add_argument("--runs", type=pathlib.Path, help="default: run/ of the repository")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, cores shared")
    parser.add_argument("--quick", action="store_true", help="a smaller model, on the excerpt")
    given = parser.parse_args()
    if given.text is None and not given.quick:
        parser.error("the whole Bible is wanted (small_lm/README.md says how), or --quick")
    out = given.out or (HERE / "quick" if given.quick else HERE)
    folder = "fp8_training_quick" if given.quick else "fp8_training"
    runs = given.runs or HERE.parents[1] / "run" / folder
    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    names = given.arithmetic or (QUICK if given.quick else ARITHMETIC)
    seeds = given.seeds or ([0] if given.quick else [0, 1, 2])
    # Seed by seed, so that what is there when a run is stopped can be compared.
    tasks = [(name, seed) for seed in seeds for name in names]
    failed = in_shares(tasks, lambda task, cores: one_run(*task, runs, given, cores), given.jobs)
    if failed:
        print("These failed:", *(f"{n}_{s}" for n, s in failed), file=sys.stderr)
        return 1
    rows = [
        json.loads((runs / f"{name}_{seed}" / "row.json").read_text(encoding="utf-8"))
        for name, seed in tasks
    ]
    found = differences(rows)
    said = broken(found, quick=given.quick)
    result = {
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", "numpy")},
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "differences": [dataclasses.asdict(each) for each in found],
        "rows": [{k: v for k, v in row.items() if k != "nll_per_window"} for row in rows],
        "holds": not said,
    }
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    curves = {n: read_metrics(runs / f"{n}_{seeds[0]}" / "metrics.jsonl") for n in names}
    title = f"seed {seeds[0]}: loss on batches (thin) and on held-out books"
    plot_runs(curves, out / "curves.png", score="held_out", title=title)
    print(as_table(found))
    print("The claim does not hold:" if said else "the claim holds", *said, sep="\n  ")
    print(f"written to {out}, {time.perf_counter() - begun:.0f} s")
    return 1 if said else 0


def one_run(
    name: str, seed: int, runs: pathlib.Path, given: argparse.Namespace, cores: list[int]
) -> bool:
    """Trains one in a process of its own, or goes on. What is finished is only scored."""
    print(f"{name}, seed {seed}, on {len(cores)} cores", flush=True)
    command = [sys.executable, str(HERE / "one_run.py"), name, "--seed", str(seed)]
    command += ["--out", str(runs.resolve()), "--cores", *map(str, cores)]
    if given.text is not None:
        command += ["--text", str(given.text.resolve())]
    command += ["--configs", str(CONFIGS / "quick" if given.quick else CONFIGS)]
    return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
