"""SmolLM2 by every way of quantizing it, beside what peers make of it. See README.md."""

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

import claims
import table
from rows import QUICK, ROWS, SITES

HERE = pathlib.Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("calibration", "evaluation"):
        text = ".npz of tokens [windows, length]; default: a part of the excerpt of the package"
        parser.add_argument(f"--{name}", type=pathlib.Path, help=text)
    known = (*ROWS, SITES)
    parser.add_argument("--rows", nargs="+", choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument(
        "--forward",
        choices=("bfloat16", "float32"),
        default="float32",
        help="in what sites multiply while calibrating",
    )
    parser.add_argument("--out", type=pathlib.Path, help="default: this folder; quick/ if --quick")
    parser.add_argument("--quick", action="store_true", help="three rows, on a few short windows")
    parser.add_argument("--again", action="store_true", help="also rows that are there already")
    given = parser.parse_args()
    out = given.out or (HERE / "quick" if given.quick else HERE)
    wanted = given.rows or (QUICK if given.quick else known)
    (out / "rows").mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    setting = {
        "calibration": None if given.calibration is None else given.calibration.name,
        "evaluation": None if given.evaluation is None else given.evaluation.name,
        "forward": given.forward,
        "quick": given.quick,
    }
    check_setting(out, setting, given.again)
    for number, name in enumerate(wanted, 1):
        file = out / "rows" / f"{name}.json"
        # A quick run is a check of the code as it is.
        if file.exists() and not (given.again or given.quick):
            continue
        passed = time.perf_counter() - start
        print(f"[{number}/{len(wanted)}, {passed:.0f} s] {name}", flush=True)
        if not one_row(name, file, given):
            print(f"{name} failed; what is done is kept in {out}", file=sys.stderr)
            return 1
    rows = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name in known
        if (file := out / "rows" / f"{name}.json").exists()
    }
    result = {
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "numpy")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **setting,
        "rows": list(rows.values()),
    }
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = table.everything(rows)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    broken = claims.broken(rows, quick=given.quick)
    print("The claim does not hold:" if broken else "the claim holds", *broken, sep="\n  ")
    print(f"written to {out}, {time.perf_counter() - start:.0f} s")
    return 1 if broken else 0


def check_setting(out: pathlib.Path, setting: dict[str, Any], again: bool) -> None:
    """Rows of one folder are of one setting, so that they can stand in one table."""
    file = out / "rows" / "setting.json"
    if file.exists() and not again and (held := json.loads(file.read_text())) != setting:
        sys.exit(
            f"The rows in {out} are of another setting: {held}, and not {setting}. Give --out "
            "another folder, or --again to replace them."
        )
    file.write_text(json.dumps(setting, indent=1) + "\n", encoding="utf-8")


def one_row(name: str, file: pathlib.Path, given: argparse.Namespace) -> bool:
    """Makes a row in a process of its own, so that its seconds and its memory are its own."""
    command = [sys.executable, str(HERE / "one_row.py"), name, str(file.resolve())]
    command += ["--forward", given.forward]
    for option in ("calibration", "evaluation"):
        if (path := getattr(given, option)) is not None:
            command += [f"--{option}", str(path.resolve())]
    if given.quick:
        command.append("--quick")
    # As the command line of jaxquant has it: see jaxquant/cli/__init__.py.
    environment = {"OPENBLAS_THREAD_TIMEOUT": "4", **os.environ}
    return subprocess.run(command, env=environment, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
