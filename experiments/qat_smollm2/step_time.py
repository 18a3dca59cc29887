"""Seconds of a training step in few bits beside those of a float32 step, in one process.

The same optimizer, 1,024 tokens a step, no accumulation, no distillation: rounds in turn, medians.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import msgspec
import numpy as np
from ptq_smollm2.subject import LENGTH, opened
from training_loop import make_optimizer, make_step, start

from jaxquant.cli._console import bar
from jaxquant.evaluate import medians
from jaxquant.models import OpenedModel
from qat_smollm2.claims import slow
from qat_smollm2.settings import Named, read_run
from qat_smollm2.subject import make_problem, make_subject

HERE = pathlib.Path(__file__).parent
WINDOWS = 2


def side(named: Named, model: OpenedModel, tokens: np.ndarray) -> Callable[[], Any]:
    """A step after the other, each from the state that the last one left."""
    run = msgspec.structs.replace(named.run, distillation=0.0)
    if named.recipe is None:
        # Groups are of what is learned beside weights, which a float model has none of.
        plain = msgspec.structs.replace(run.optimizer, groups={})
        run = msgspec.structs.replace(run, optimizer=plain)
    subject = make_subject(named, model)
    problem = make_problem(run, subject, tokens, {})
    optimizer = make_optimizer(run.optimizer, run.loop.steps, problem.labels)
    step = jax.jit(make_step(problem, optimizer, seed=0), donate_argnums=0)
    held = [start(problem, optimizer)]
    parts = jax.numpy.asarray(problem.batch(0))[None]

    def one() -> Any:
        state, told = step(held.pop(), parts, problem.fixed)
        held.append(state)
        return state, told

    return one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "step_time.json")
    given = parser.parse_args()
    model = opened()
    # The numbers do not matter to the time.
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (8, given.length))
    named = read_run("w4a8_qat")
    sides = {
        "float32": side(dataclasses.replace(named, recipe=None), model, ids),
        "w4a8": side(named, model, ids),
    }
    with bar("timing steps") as progress:
        timings = medians(sides, rounds=given.rounds, progress=progress)
    ratio = timings["float32"].ratio(timings["w4a8"])
    found = {
        "tokens_a_step": WINDOWS * given.length,
        "ratio": ratio,
        "median": {name: timing.median for name, timing in timings.items()},
        "seconds": {name: timing.seconds for name, timing in timings.items()},
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: found[k] for k in ("tokens_a_step", "median", "ratio")}, indent=1))
    said = slow(ratio)
    print("The claim does not hold:" if said else "the claim holds", *said, sep="\n  ")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
