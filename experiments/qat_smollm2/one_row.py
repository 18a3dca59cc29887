"""One row of the table, in a process of its own: `run.py` starts it, and so can you."""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import msgspec
import numpy as np
from ptq_smollm2.peers import digest
from ptq_smollm2.scores import bits, scores
from ptq_smollm2.subject import Data, opened, tokens
from training_loop import (
    make_optimizer,
    make_step,
    Problem,
    start,
    train,
    TrainingError,
)

import jaxquant as jq
from jaxquant.calibrate import calibrate, token_batches
from jaxquant.checkpoint import materialize
from jaxquant.cli._quantize import peak_rss_bytes, plan_for
from jaxquant.evaluate import score
from jaxquant.models import bind, open_model, OpenedModel, save_model
from qat_smollm2.converted import (
    by_command_line,
    captured,
    chosen,
    flipped_codes,
    site_differences,
)
from qat_smollm2.rows import cut, MADE, Made, ROWS
from qat_smollm2.settings import CONFIGS, Named, read_run
from qat_smollm2.subject import make_problem, make_subject, settings_of, Subject

CHECKED_SITES = 16
"""Sites whose bits are compared, from the first layer to the last."""
TOLD = ("nll", "nll_difference", "nll_difference_stderr", "kl", "top1")
"""What the table takes from the command line."""
QUANTIZED = "quantized"
"""The folder of a row's checkpoint, in the folder of the row."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """What all rows share: the model, windows to train on and to score, where rows are kept."""

    opened: OpenedModel
    train: np.ndarray
    evaluation: np.ndarray
    runs: pathlib.Path
    quick: bool = False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=ROWS)
    parser.add_argument("--runs", type=pathlib.Path, required=True, help="holds a folder a row")
    parser.add_argument("--tokens", type=pathlib.Path)
    parser.add_argument("--evaluation", type=pathlib.Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    model = opened()
    data = Data(
        calibration=arguments.tokens, evaluation=arguments.evaluation, quick=arguments.quick
    )
    windows, evaluation = tokens(data, model)
    given = Given(
        opened=model,
        train=windows,
        evaluation=evaluation,
        runs=arguments.runs,
        quick=arguments.quick,
    )
    try:
        write(made(arguments.name, given, arguments.steps), given)
    except (TrainingError, ValueError, OSError, RuntimeError) as error:
        print(f"{arguments.name}: {error}", file=sys.stderr)
        return 2
    return 0


def made(name: str, given: Given, steps: int | None = None) -> dict[str, Any]:
    """The row of a name."""
    if name in MADE:
        row = MADE[name]
        if given.quick and row.recipe is not None:
            row = dataclasses.replace(row, recipe=cut(row.recipe))
        return calibrated(name, row, given)
    return trained(named_run(name, given.quick, steps), given)


def named_run(name: str, quick: bool, steps: int | None) -> Named:
    """The settings of a run; `steps` in place of those of its file."""
    named = read_run(name, CONFIGS / "quick" if quick else CONFIGS)
    if quick and named.recipe is not None:
        named = dataclasses.replace(named, recipe=cut(named.recipe))
    if steps is not None:
        optimizer = named.run.optimizer
        warmup = min(optimizer.warmup, steps - 1)
        run = msgspec.structs.replace(
            named.run,
            loop=msgspec.structs.replace(named.run.loop, steps=steps),
            optimizer=msgspec.structs.replace(optimizer, warmup=warmup),
        )
        named = dataclasses.replace(named, run=run)
    return named


def write(row: dict[str, Any], given: Given) -> None:
    """Written beside and renamed: a row that is there is whole."""
    folder = given.runs / row["name"]
    folder.mkdir(parents=True, exist_ok=True)
    row["tokens"] = {"train": digest(given.train), "evaluation": digest(given.evaluation)}
    part = folder / "row.part"
    part.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / "row.json")


def calibrated(name: str, row: Made, given: Given) -> dict[str, Any]:
    """A row without training: the float model, or its codes by rounding or with data."""
    model = given.opened
    variables = materialize(model.variables)
    float_model = bind(model.model, variables)
    if row.recipe is None:
        found = score(float_model, given.evaluation, against=float_model)
        return {"name": name, "what": row.what, **scores(found), "bits_per_weight": 32.0}
    plan = plan_for(model, row.recipe)
    begun = time.perf_counter()
    if plan.needs_calibration:
        batches = token_batches(given.train, model.config.vocab_size)
        qvariables = calibrate(model.model, variables, batches, plan).qvariables
    else:
        qvariables = jq.quantize(variables, plan)
    jax.block_until_ready(qvariables)
    seconds = time.perf_counter() - begun
    save_model(given.runs / name / QUANTIZED, model, qvariables, plan)
    quantized = jq.wrap(model.model, plan, jq.prepare(qvariables, plan))
    return {
        "name": name,
        "what": row.what,
        "windows": len(given.train) if plan.needs_calibration else 0,
        **scores(score(quantized, given.evaluation, against=float_model)),
        "seconds": seconds,
        "bits_per_weight": bits(plan),
    }


def trained(named: Named, given: Given) -> dict[str, Any]:
    """Trains, or goes on; then converts, saves, and compares what was trained with what is used."""
    started = None
    if named.run.start is not None:
        folder = given.runs / named.run.start / QUANTIZED
        if not folder.is_dir():
            raise ValueError(f"{named.name} starts from {named.run.start}. Make that row first.")
        started = open_model(folder).variables
    out, loop = given.runs / named.name, named.run.loop
    subject = make_subject(named, given.opened, started)
    problem = make_problem(
        named.run, subject, given.train, {"tokens": digest(given.train), "quick": given.quick}
    )
    before = digest_of(subject.fixed)
    # What lies between needs the step compiled once more.
    compared = subject.plan is None or subject.adapters
    memory = memory_of(problem, named, within=compared and not given.quick)
    # Batches differ by more than a few steps change: the loss is that of the same windows.
    first = problem.evaluate(subject.trained, ())["monitored"]
    begun = time.perf_counter()
    done = train(problem, loop, named.run.optimizer, out, name=named.name)
    variables = done.state.variables
    row = {
        "name": named.name,
        "what": named.run.what,
        "settings": settings_of(named.run),
        "steps": loop.steps,
        "tokens_a_step": loop.batch * given.train.shape[1],
        "seconds": time.perf_counter() - begun,
        "seconds_per_step": done.seconds_per_step,
        "losses": {"first": first, "last": done.scores["monitored"]},
        "memory": {**memory, "peak_rss": peak_rss_bytes()},
    }
    del done, problem
    return row | after(named, subject, variables, given) | frozen(subject, before)


def after(named: Named, subject: Subject, variables: Any, given: Given) -> dict[str, Any]:
    """Scores of what was trained; of a plan's, also of its codes, from the checkpoint."""
    model = given.opened
    simulated = subject.simulated(variables)
    if subject.plan is None:
        found = score(simulated, given.evaluation, against=bind(model.model, subject.floats))
        return {**scores(found), "bits_per_weight": 32.0}
    plan = subject.plan
    qvariables = subject.converted(variables)
    folder = given.runs / named.name / QUANTIZED
    save_model(folder, model, qvariables, plan)
    quantized = jq.wrap(model.model, plan, jq.prepare(qvariables, plan))
    # How often training and use differ in their likeliest token, and by how many nats.
    between = score(quantized, given.evaluation, against=simulated)
    told = by_command_line(folder, given.evaluation, model.path)
    row = {
        **{name: told[name] for name in TOLD},
        "bits_per_weight": bits(plan),
        "trained_nll": between.nll - (between.nll_difference or 0.0),
        "kl_of_converted": between.kl,
        "flipped_argmax": 1 - (between.top1 or 0.0),
        "cli_nll": told["nll"],
    }
    if subject.adapters:
        return row
    window = given.evaluation[:1]
    sites = chosen(captured(subject, window), 4 if given.quick else CHECKED_SITES)
    row["sites"] = site_differences(subject, variables, sites)
    if not given.quick and any(site.activations is not None for site in plan.sites):
        flips = flipped_codes(subject, variables, window)
        row["flipped_codes"] = {"mean": float(np.mean(list(flips.values()))), "by_site": flips}
    return row


def frozen(subject: Subject, before: str) -> dict[str, Any]:
    """Whether what stays is what it was, to the bit."""
    return {"codes_unchanged": digest_of(subject.fixed) == before} if subject.adapters else {}


def digest_of(tree: Any) -> str:
    """Of all bytes of a tree of arrays."""
    made = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        made.update(np.asarray(leaf).view(np.uint8).tobytes() if leaf.size else b"")
    return made.hexdigest()


def memory_of(problem: Problem, named: Named, *, within: bool) -> dict[str, int]:
    """Bytes of what a step reads and writes, and of what it holds `within` (residuals mostly)."""
    optimizer = make_optimizer(named.run.optimizer, named.run.loop.steps, problem.labels)
    state = jax.eval_shape(lambda: start(problem, optimizer))
    found = {
        "trained": bytes_of(state.variables),
        "optimizer": bytes_of(state.optimizer),
        "fixed": bytes_of(problem.fixed),
    }
    if within:
        batch = np.asarray(problem.batch(0))
        parts = jax.ShapeDtypeStruct((1, *batch.shape), batch.dtype)
        step = jax.jit(make_step(problem, optimizer, seed=named.run.loop.seed), donate_argnums=0)
        compiled = step.lower(state, parts, problem.fixed).compile()
        found["temporary"] = compiled.memory_analysis().temp_size_in_bytes
    return found


def bytes_of(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    sys.exit(main())
