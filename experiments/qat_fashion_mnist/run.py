"""Quantization-aware training of a CNN and a ViT on Fashion-MNIST. See README.md."""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from claims import as_text, broken, means
from fashion_mnist import DEBIAN, read
from plot import write_plot
from settings import FIXED, FLOAT, FULL, LSQ, MODELS, PTQ, QUICK, Settings, STE, TUNED
from training_loop import in_shares

HERE = pathlib.Path(__file__).parent
ORDER = (FIXED, LSQ, STE, TUNED, PTQ)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One row: a model, by one method, at so many bits, from one seed."""

    model: str
    method: str
    bits: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}_{self.method}_{self.bits}_{self.seed}"


def planned(size: Settings, models: list[str], seeds: list[int]) -> list[list[Run]]:
    """Float models, then all that starts from them, what takes longest first."""

    def runs(method: str, bits: int) -> list[Run]:
        return [
            Run(model=model, method=method, bits=bits, seed=seed)
            for model in sorted(models, reverse=True)
            for seed in seeds
        ]

    later = [run for method, bits in (*size.runs, (TUNED, 32)) for run in runs(method, bits)]
    return [runs(FLOAT, 32), sorted(later, key=lambda run: ORDER.index(run.method))]


def digest(size: Settings, run: Run) -> str:
    """What a row depends on besides its name. Other models' schedules do not matter."""
    facts = [size.images, size.tests, size.batch, size.calibration, size.first[run.model]]
    if run.method != FLOAT:
        facts += [size.tuned[run.model], size.learned_rate]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def done(file: pathlib.Path, size: Settings, run: Run) -> dict[str, Any] | None:
    """The row, if it is there and of these settings."""
    if not file.is_file():
        return None
    row = json.loads(file.read_text())
    return row if row["settings"] == digest(size, run) else None


def make(run: Run, size: Settings, data: pathlib.Path, rows: pathlib.Path) -> None:
    """Computes one row in this process, and writes it whole or not at all."""
    import one_run  # Here: the process that starts others needs no JAX.

    train = read(data, "train", size.images)
    test = read(data, "t10k", size.tests)

    def say(text: str) -> None:
        print(f"  {run.name}: {text}", flush=True)

    row = one_run.run(
        run.model, run.bits, run.method, run.seed, size, train, test, rows / "weights", say
    )
    row |= {"settings": digest(size, run), "cores": len(os.sched_getaffinity(0))}
    file = rows / f"{run.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(row, indent=1) + "\n")
    part.rename(file)
    print(f"{run.name}: {row['accuracy']:.2f} % in {row['total_seconds']:.0f} s", flush=True)


def in_own_process(run: Run, cores: list[int], arguments: argparse.Namespace) -> bool:
    """Whether the row was made."""
    command = [sys.executable, str(HERE / "run.py"), "--only", run.name]
    command += ["--data", str(arguments.data), "--rows", str(arguments.rows)]
    command += ["--cores", *map(str, cores), *(["--quick"] if arguments.quick else [])]
    return subprocess.run(command, check=False).returncode == 0


def with_result(readme: str, table: str) -> str:
    """The README with `table` under its last heading, *Result*."""
    before, heading, _ = readme.partition("## Result\n")
    return f"{before}{heading}\n{table}\n\n![Test error by bits](accuracy.png)\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, default=DEBIAN, help="four .gz files")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: three, one with --quick")
    parser.add_argument("--jobs", type=int, default=4, help="runs at a time, a core each")
    parser.add_argument("--quick", action="store_true", help="less of it, in the folder quick/")
    parser.add_argument("--rows", type=pathlib.Path, help="where runs that are done are kept")
    parser.add_argument("--only", metavar="NAME", help="one run, cnn_lsq_4_0, in this process")
    parser.add_argument("--cores", nargs="+", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out = HERE / "quick" if arguments.quick else HERE
    arguments.rows = arguments.rows or arguments.out / "rows"
    return arguments


def main() -> int:
    arguments = parse_arguments()
    size = QUICK if arguments.quick else FULL
    if arguments.cores:
        os.sched_setaffinity(0, arguments.cores)
    try:
        read(arguments.data, "t10k", 1)
        read(arguments.data, "train", 1)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.only:
        model, rest = arguments.only.split("_", 1)
        method, bits, seed = rest.rsplit("_", 2)
        run = Run(model=model, method=method, bits=int(bits), seed=int(seed))
        make(run, size, arguments.data, arguments.rows)
        return 0
    start = time.perf_counter()
    phases = planned(size, arguments.models, arguments.seeds or list(size.seeds))
    for phase in phases:
        left = [r for r in phase if done(arguments.rows / f"{r.name}.json", size, r) is None]
        print(f"{len(left)} runs to do, {len(phase) - len(left)} done already", flush=True)
        one = functools.partial(in_own_process, arguments=arguments)
        if failed := in_shares(left, one, arguments.jobs):
            print("These failed:", *(run.name for run in failed), file=sys.stderr)
            return 1
    every = [run for phase in phases for run in phase]
    rows = [done(arguments.rows / f"{run.name}.json", size, run) for run in every]
    found = [row for row in rows if row is not None]
    table = means(found)
    text = as_text(table)
    print(text)
    complaints = broken(table, size)
    results = {
        "settings": dataclasses.asdict(size),
        "table": table,
        "rows": [{k: v for k, v in row.items() if k != "losses"} for row in found],
        "seconds": time.perf_counter() - start,
        "cpu_seconds": sum(row["total_seconds"] * row["cores"] for row in found),
        "holds": not complaints,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_plot(arguments.out / "accuracy.png", found)
    if size is FULL and {*arguments.models} == {*MODELS}:
        readme = HERE / "README.md"
        readme.write_text(with_result(readme.read_text(), text))
    print("\n".join(complaints) or "the claim holds")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
