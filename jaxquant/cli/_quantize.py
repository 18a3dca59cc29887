"""`jaxquant quantize`: from a float model to a folder, one parameter in memory at a time."""

import argparse
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .. import recipes
from ..algorithms import quantize
from ..evaluate import weight_error, WeightError
from ..intercept import Plan, plan as make_plan, Recipe
from ..intercept._variables import parameters
from ..models import is_checkpoint, open_model, OpenedModel, save_model, variables_inventory
from ..qarray import QArray
from ._console import bar, check_json, say, write_json
from ._inspect import inventory_json, size_text

ALGORITHM = "nearest"


def run_quantize(arguments: argparse.Namespace) -> None:
    """The command."""
    start = time.perf_counter()
    check_json(arguments.json)
    recipe = recipes.find(arguments.recipe)
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
    check_out(arguments.out)
    with bar("quantizing") as progress:
        qvariables = quantize(opened.variables, plan, progress=counted(progress, plan))
    errors = _errors(opened.variables, qvariables)
    with bar("writing") as progress:
        save_model(arguments.out, opened, qvariables, plan, progress=counted(progress, plan))
    inventory = variables_inventory(qvariables)
    result = {
        "model": str(arguments.model),
        "source": opened.source,
        "recipe": recipe.name,
        **inventory_json(inventory),
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peak_rss_bytes(),
        "sites": _sites_json(plan, errors),
    }
    write_json(arguments.json, result)
    worst = min(errors, key=lambda path: errors[path].snr_db or float("inf"))
    say(
        f"{arguments.out}: {inventory.parameters:,} parameters of {arguments.model} "
        f"({opened.source}) by {recipe.name}: {size_text(inventory.bytes)}, "
        f"{inventory.bits_per_weight:.3f} bits a weight"
    )
    say(
        f"{len(errors)} weights quantized; most noise in {worst}: {_decibels(errors[worst])}; "
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


def _errors(variables: nnx.State, qvariables: nnx.State) -> dict[str, WeightError]:
    """Errors by path. The weights are read a second time, again one at a time."""
    floats = parameters(variables)
    return {
        path: weight_error(floats[path], q)
        for path, q in parameters(qvariables).items()
        if isinstance(q, QArray)
    }


def _sites_json(plan: Plan, errors: dict[str, WeightError]) -> list[dict[str, Any]]:
    rows = []
    for site in plan.sites:
        row: dict[str, Any] = {"site": site.site, "path": site.path, "shape": list(site.shape)}
        if site.weights is None:
            row |= {"algorithm": None, "scheme": None, "reason": site.reason}
        else:
            error = errors[site.path]
            row |= {
                "algorithm": ALGORITHM,
                "scheme": str(site.weights),
                "activations": None if site.activations is None else str(site.activations),
                "errors": {
                    "snr_db": error.snr_db,
                    "relative": error.relative,
                    "largest": error.largest,
                },
            }
        rows.append(row)
    return rows


def _decibels(error: WeightError) -> str:
    return "none" if error.snr_db is None else f"signal to noise {error.snr_db:.1f} dB"


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
