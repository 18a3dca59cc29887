"""Runs one case on one library and writes what came out. `run.py` calls this in its own process."""

import argparse
import importlib
import json
import pathlib

import numpy as np
from cases import CASES

# What a library may say instead of an answer. Anything else ends the process, which also counts.
ANSWERS_IN_WORDS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=("qwix", "jaxquant"), required=True)
    parser.add_argument("--case", type=int, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder")
    arguments = parser.parse_args()
    case = CASES[arguments.case]
    run = importlib.import_module(f"{arguments.library}_cases").RUNS[case.number]
    raised: dict[str, str] = {}
    for index, part in enumerate(case.parts):
        try:
            outputs = run(part, case.inputs(part))
        except ANSWERS_IN_WORDS as error:
            raised[part] = f"{type(error).__name__}: {error}"
            continue
        arrays = {name: np.asarray(value) for name, value in outputs.items()}
        # NumPy's files have no bfloat16; float64 holds whatever a library answers with.
        wide = {k: a if a.dtype.kind in "iufU" else a.astype(float) for k, a in arrays.items()}
        np.savez(arguments.out / f"{index}.npz", **wide)
    (arguments.out / "raised.json").write_text(json.dumps(raised), encoding="utf-8")


if __name__ == "__main__":
    main()
