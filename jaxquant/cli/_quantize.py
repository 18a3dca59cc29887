"""`jaxquant quantize`: from a float model to a folder, by parameters or, with data, by blocks."""

import argparse
import math
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .. import recipes
from ..algorithms import quantize
from ..intercept import Account, Plan, plan as make_plan, Recipe
from ..models import is_checkpoint, open_model, OpenedModel, save_model, variables_inventory
from ..ops import Outliers
from ._calibrate import calibrated, check_needed, finished, read_ids, site_rows, summary
from ._console import bar, check_json, say, write_json
from ._inspect import inventory_json, size_text

ALGORITHM = "nearest"
"""What chooses codes where a recipe names no algorithm."""


def run_quantize(arguments: argparse.Namespace) -> None:
    """The command."""
    start = time.perf_counter()
    check_json(arguments.json)
    recipe = recipes.find(arguments.recipe)
    tokens = read_ids(arguments)
    opened = open_model(arguments.model)
    if opened.plan is not None:
        raise ValueError(
            f"{arguments.model} is quantized already, by the recipe {opened.plan.recipe!r}. "
            "Quantize the model that it was made from."
        )
    plan = plan_for(opened, recipe)
    if not plan.leaves:
        raise ValueError(
            f"The recipe {recipe.name!r} leaves every weight of {arguments.model} as it is. Give "
            "at least one of its rules `weights`."
        )
    check_needed(plan, arguments.calibration)
    check_out(arguments.out)
    run, rows, said = {}, {}, []
    if plan.needs_calibration:
        made, told = calibrated(opened, plan, tokens, arguments)
        qvariables, account = made.qvariables, made.account
        run, rows, said = {"calibration": told}, site_rows(made), summary(made)
    else:
        with bar("quantizing") as progress:
            qvariables, account = quantize(
                opened.variables, plan, account=True, progress=counted(progress, plan)
            )
    with bar("writing") as progress:
        done = counted(progress, plan)
        save_model(arguments.out, opened, qvariables, plan, account=account, progress=done)
    finished(arguments.out)
    inventory = variables_inventory(qvariables, account)
    result = {
        "model": str(arguments.model),
        "source": opened.source,
        "recipe": recipe.name,
        **inventory_json(inventory),
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peak_rss_bytes(),
        **run,
        "sites": sites_json(account, rows),
    }
    write_json(arguments.json, result)
    say(str(account))
    for line in said:
        say(line)
    say(
        f"{arguments.out}: {inventory.parameters:,} parameters of {arguments.model} "
        f"({opened.source}) by {recipe.name}: {size_text(inventory.bytes)}, "
        f"{inventory.bits_per_weight:.3f} bits a weight"
    )
    say(
        f"{len(account.errors)} weights quantized; {_most_noise(account)}; "
        f"{result['seconds']:.1f} s, at most {size_text(result['peak_rss_bytes'])} in memory"
    )


def plan_for(opened: OpenedModel, recipe: Recipe) -> Plan:
    """The plan for a model that reads tokens; nothing is computed, nothing is read."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return make_plan(opened.model, nnx.state(opened.model), tokens, recipe=recipe)


def counted(progress: Callable[[int, int], None], plan: Plan) -> Callable[[str], None]:
    """A function of a path that is done, which tells `progress` how many are."""
    done = 0

    def count(path: str) -> None:
        nonlocal done
        done += 1
        progress(done, max(done, len(plan.sizes)))

    return count


def check_out(out: pathlib.Path) -> None:
    """Says now what would stop the writing after the work.

    **Raises:** `ValueError` if something that is no checkpoint of ours is there.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not is_checkpoint(out):
        raise ValueError(
            f"{out} exists and jaxquant did not write it. Give a folder that does not exist yet."
        )


def sites_json(account: Account, beside: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each site, as `--json` has them, with what `beside` has of it."""
    rows = []
    for site in account.sites:
        row: dict[str, Any] = {"site": site.site, "path": site.path, "shape": list(site.shape)}
        row |= {"bits_per_value": site.bits_per_value, "rule": site.rule, "reason": site.reason}
        if site.reason is not None:
            row |= {"algorithm": None, "scheme": None, "sqnr_db": None}
        else:
            assert site.error is not None
            row |= {
                "algorithm": ALGORITHM if site.algorithm is None else site.algorithm.name,
                "scaling": None if site.scaling is None else site.scaling.name,
                "scheme": str(site.weights),
                "activations": None if site.activations is None else str(site.activations),
                "static": site.static,
                "outliers": None if site.outliers is None else _outliers(site.outliers),
                "sqnr_db": site.sqnr_db,
                "errors": {
                    "snr_db": site.sqnr_db,
                    "relative": site.error.relative,
                    "largest": site.error.largest,
                },
                **beside.get(site.site, {}),
            }
        rows.append(row)
    return rows


def _outliers(outliers: Outliers) -> dict[str, Any]:
    """As recipes name them; JSON has no infinity."""
    threshold = outliers.threshold if math.isfinite(outliers.threshold) else None
    return {
        "threshold": threshold,
        "weights": outliers.weights.value,
        "columns": outliers.columns,
    }


def _most_noise(account: Account) -> str:
    noisy = {path: error.sqnr_db for path, error in account.errors if error.sqnr_db is not None}
    if not noisy:
        return "none has any noise"
    worst = min(noisy, key=lambda path: noisy[path])
    return f"most noise in {worst}: signal to noise {noisy[worst]:.1f} dB"


def peak_rss_bytes() -> int:
    """The most memory this process held, mapped files included.

    Linux says it in `VmHWM`; `getrusage` there still counts what the parent held before `exec`.
    """
    status = pathlib.Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
