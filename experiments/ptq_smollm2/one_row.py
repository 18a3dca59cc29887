"""One row of the table, in a process of its own: `run.py` starts it."""

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
from rows import quick, Row, ROWS, SITES, SMOOTH_WINDOWS
from scores import bits, scores
from static_sites import site_rows
from subject import Data, opened, spread, tokens

import jaxquant as jq
from jaxquant.calibrate import calibrate, Calibrated, Settings, token_batches
from jaxquant.checkpoint import materialize
from jaxquant.cli._quantize import peak_rss_bytes, plan_for
from jaxquant.evaluate import score
from jaxquant.models import bind

COMPILING = ("/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_to_mlir_")


class Compiling:
    """Seconds of compiling so far: of XLA, and of what is written for it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith(COMPILING):
            self.seconds += duration_secs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=(*ROWS, SITES))
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--calibration", type=pathlib.Path)
    parser.add_argument("--evaluation", type=pathlib.Path)
    parser.add_argument("--forward", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    data = Data(calibration=given.calibration, evaluation=given.evaluation, quick=given.quick)
    model = opened()
    calibration, evaluation = tokens(data, model)
    if given.name == SITES:
        found: dict[str, Any] = {
            "name": SITES,
            "sites": site_rows(model, spread(calibration, SMOOTH_WINDOWS)),
        }
    else:
        row = quick(ROWS[given.name]) if given.quick else ROWS[given.name]
        found = measured(row, model, calibration, evaluation, row.forward or given.forward)
    found["tokens"] = {
        "calibration": peers.digest(calibration),
        "evaluation": peers.digest(evaluation),
    }
    # Written beside and renamed: a file that is there is whole.
    part = given.file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(given.file)


def measured(
    row: Row, model: Any, calibration: np.ndarray, evaluation: np.ndarray, forward: str
) -> dict[str, Any]:
    """What a recipe costs and what it gives."""
    compiling = Compiling()
    plan = plan_for(model, row.recipe)
    data = spread(calibration, row.windows) if plan.needs_calibration else calibration[:0]
    variables = materialize(model.variables)
    start = time.perf_counter()
    made = None
    if plan.needs_calibration:
        narrow = None if forward == "float32" else jnp.dtype(forward)
        batches = token_batches(data, model.config.vocab_size)
        made = calibrate(model.model, variables, batches, plan, settings=Settings(narrow=narrow))
        qvariables = made.qvariables
    else:
        qvariables = jq.quantize(variables, plan)
    jax.block_until_ready(qvariables)
    seconds, compile_seconds, rss = (
        time.perf_counter() - start,
        compiling.seconds,
        peak_rss_bytes(),
    )
    quantized = jq.wrap(model.model, plan, jq.prepare(qvariables, plan))
    scored = score(quantized, evaluation, against=bind(model.model, variables))
    return {
        "name": row.name,
        "what": row.what,
        "config": row.config,
        "recipe": [str(rule) for rule in row.recipe.rules],
        "windows": len(data),
        "forward": forward if plan.needs_calibration else None,
        **scores(scored),
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "scoring_seconds": scored.seconds,
        "rss_bytes": rss,
        "rss_bytes_with_scoring": peak_rss_bytes(),
        "bits_per_weight": bits(plan),
        "calibrated": None if made is None else account(made),
    }


def account(made: Calibrated) -> dict[str, Any]:
    """What the driver tells: of layers that became worse on the very data, and of all notes."""
    pairs = [(r.root, r.error, r.nearest_error) for r in made.sites]
    ratios = [e / n for _, e, n in pairs if e is not None and n]
    return {
        "sites": len(made.sites),
        "programs": made.compiled,
        "median_error_over_rounding": float(np.median(ratios)) if ratios else None,
        "worst_error_over_rounding": max(ratios) if ratios else None,
        "notes": [f"{r.root}: {note}" for r in made.sites for note in r.notes],
        "scaled_groups": len(made.scalings),
        "unscaled": list(made.unscaled),
    }


if __name__ == "__main__":
    main()
