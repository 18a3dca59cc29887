"""22 cases that a peer library gets wrong, on it and on jaxquant. See README.md."""

import argparse
import concurrent.futures
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from cases import CASES
from table import details, table
from verdict import Case

HERE = pathlib.Path(__file__).parent
QWIX = "0.1.8"
LIBRARIES = ("qwix", "jaxquant")
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--qwix-python", type=pathlib.Path, help="a Python that has qwix")
    parser.add_argument(
        "--qwix-venv",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir()) / f"jaxquant-peer-qwix-{QWIX}",
        help="where qwix is installed, unless --qwix-python says where it is; default: %(default)s",
    )
    parser.add_argument("--seconds", type=float, default=300, help="longest time for a case")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="jaxquant alone, unless --qwix-python is given; writes elsewhere",
    )
    parser.add_argument("--out", type=pathlib.Path, help="default: results.json beside this file")
    arguments = parser.parse_args()
    if arguments.out is None:
        folder = pathlib.Path(tempfile.mkdtemp()) if arguments.quick else HERE
        arguments.out = folder / "results.json"
    return arguments


def make_venv(folder: pathlib.Path) -> pathlib.Path:
    """The Python of a virtual environment that holds qwix, beside the jax and flax used here."""
    python = folder / "bin" / "python"
    if has_qwix(python):
        return python
    print(f"Installing qwix {QWIX} in {folder} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    same = [f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "flax")]
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"qwix=={QWIX}", *same], check=True)
    return python


def has_qwix(python: pathlib.Path) -> bool:
    return python.exists() and versions(python).get("qwix") == QWIX


def versions(python: pathlib.Path) -> dict[str, str]:
    """What is installed there, of the packages that matter."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "print(json.dumps({d.name: d.version for d in m.distributions() if d.name in sys.argv}))"
    )
    names = ("qwix", "jaxquant", *PACKAGES)
    done = subprocess.run(
        [python, "-c", code, *names], check=True, capture_output=True, text=True, env=apart()
    )
    return json.loads(done.stdout)


def apart() -> dict[str, str]:
    """The environment without what leads to packages of ours, on the CPU."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return kept | {"JAX_PLATFORMS": "cpu"}


def run_case(library: str, case: Case, python: pathlib.Path, seconds: float) -> dict[str, Any]:
    """What each part of the case came to on one library, judged here."""
    command = [python, HERE / "one_case.py", "--library", library, "--case", str(case.number)]
    environment = apart() if library == "qwix" else os.environ | {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        ended, raised = "", {}
        try:
            done = subprocess.run(
                [*command, "--out", folder],
                capture_output=True,
                text=True,
                timeout=seconds,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            ended = f"no answer within {seconds:.0f} s"
        else:
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
                ended = f"the process ended with {done.returncode}: {last}"
        if (folder / "raised.json").is_file():
            raised = json.loads((folder / "raised.json").read_text(encoding="utf-8"))
        parts = {}
        for index, part in enumerate(case.parts):
            file = folder / f"{index}.npz"
            if part in raised or not file.is_file():
                text = " ".join(raised.get(part, ended).split())
                parts[part] = {"ok": False, "raised": text}
                continue
            with np.load(file) as outputs:
                verdict = case.judge(part, case.inputs(part), dict(outputs))
            parts[part] = {"ok": verdict.ok, "said": verdict.said, **verdict.measured}
        return parts


def row_of(case: Case, sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One row of the results: `None` where a side was not run."""

    def counts(library: str, part: str) -> bool:
        """A part that every side raises on, and may, counts for none."""
        ran = [sides[other] for other in LIBRARIES if sides[other]]
        may = part in case.may_refuse and all("raised" in parts[part] for parts in ran)
        return not may

    def ok(library: str) -> bool | None:
        parts = sides[library]
        if not parts:
            return None
        return all(parts[part]["ok"] for part in case.parts if counts(library, part))

    return {
        "case": case.number,
        "title": case.title,
        "criterion": case.criterion,
        "qwix_ok": ok("qwix"),
        "jaxquant_ok": ok("jaxquant"),
        "jaxquant_built": case.built,
        **{library: sides[library] for library in LIBRARIES},
    }


def main() -> int:
    arguments = parse_arguments()
    pythons = {"jaxquant": pathlib.Path(sys.executable)}
    if arguments.qwix_python is not None:
        pythons["qwix"] = arguments.qwix_python
    elif not arguments.quick:
        pythons["qwix"] = make_venv(arguments.qwix_venv)
    chosen = [CASES[number] for number in arguments.cases]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        running = {
            (case.number, library): pool.submit(
                run_case, library, case, pythons[library], arguments.seconds
            )
            for case in chosen
            for library in LIBRARIES
            if library in pythons and (library != "jaxquant" or case.built)
        }
        rows = []
        for case in chosen:
            sides = {
                library: running[case.number, library].result()
                if (case.number, library) in running
                else {}
                for library in LIBRARIES
            }
            rows.append(row_of(case, sides))
            print(f"case {case.number} done", file=sys.stderr, flush=True)
    print(table(rows))
    print(details(rows))
    results = {
        "versions": {library: versions(python) for library, python in pythons.items()},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {arguments.out}")
    wrong = [row["case"] for row in rows if row["jaxquant_built"] and not row["jaxquant_ok"]]
    for number in wrong:
        print(f"FAILS: case {number} on jaxquant")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
