"""What `jaxquant quantize --calibration` does beside rounding: data, the run folder, the table."""

import argparse
import math
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..calibrate import calibrate, Calibrated, Settings, token_batches
from ..calibrate._journal import finished_levels
from ..evaluate import read_tokens
from ..intercept import Plan
from ..models import OpenedModel
from ._live import live_table
from ._windows import LENGTH, text_windows

FORWARD = ("float32", "bfloat16")
"""In what sites may multiply while calibrating; sums are in float32."""

_UNSCALED = "its input is not scaled: nothing makes it in proportion"
_ABOUT_DATA = ("resume", "windows", "length", "batch", "forward")


def read_ids(arguments: argparse.Namespace) -> np.ndarray | None:
    """The windows of `--calibration FILE.npz`; `None` for text, or where there is no calibration.

    Cheap: to be called before the model is opened.

    **Raises:** `OSError`; `ValueError` for a file that holds something else, or options that have
    nothing to act on.
    """
    path = arguments.calibration
    if path is None:
        for name in _ABOUT_DATA:
            if getattr(arguments, name):
                raise ValueError(
                    f"--{name} is about calibration, and there is none. Give --calibration FILE, "
                    f"or leave out --{name}."
                )
        return None
    if path.suffix != ".npz":
        return None
    tokens = read_tokens(path)
    if arguments.length is not None:
        raise ValueError(
            f"--length cuts text into windows, and {path} holds windows of {tokens.shape[1]} "
            "tokens. Leave it out."
        )
    return _first(tokens, arguments)


def check_needed(plan: Plan, calibration: pathlib.Path | None) -> None:
    """Says whether data is missing or of no use.

    **Raises:** `ValueError` for either.
    """
    sites = plan.needs_calibration
    if sites and calibration is None:
        raise ValueError(
            f"The recipe {plan.recipe!r} needs data at {len(sites)} sites, {sites[0]} the first. "
            "Give --calibration FILE: text, or a .npz file with an integer array 'tokens' "
            "[windows, length]."
        )
    if not sites and calibration is not None:
        raise ValueError(
            f"The recipe {plan.recipe!r} needs no data: nothing would be done with {calibration}. "
            "Leave out --calibration."
        )


def calibrated(
    opened: OpenedModel, plan: Plan, tokens: np.ndarray | None, arguments: argparse.Namespace
) -> tuple[Calibrated, dict[str, Any]]:
    """The model by `plan`, with a line for each site, and what `--json` says of the run.

    `tokens` are those of `read_ids`. Finished levels are kept in a folder beside `OUT`, which is
    kept until `finished` is called.

    **Raises:** `ValueError` and `OSError` for what cannot be used or written; `KeyboardInterrupt`
    saying how to go on.
    """
    path = arguments.calibration
    if tokens is None:
        length = arguments.length or LENGTH
        ids = "a .npz file with an integer array 'tokens' [windows, length]"
        tokens = _first(text_windows(path, opened, length, ids=ids), arguments)
    forward = arguments.forward or FORWARD[0]
    narrow = None if forward == FORWARD[0] else jnp.dtype(forward)
    size = {} if arguments.batch is None else {"size": arguments.batch}
    batches = token_batches(tokens, opened.config.vocab_size, **size)
    folder = run_folder(arguments.out)
    existed = folder.exists()
    try:
        with live_table() as told:
            made = calibrate(
                opened.model,
                opened.variables,
                batches,
                plan,
                out=folder,
                resume=arguments.resume,
                keep=True,
                settings=Settings(narrow=narrow),
                progress=told,
            )
    except (KeyboardInterrupt, ValueError, OSError) as error:
        done = finished_levels(folder)
        if not done and not existed:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ValueError) and done and not existed:
            raise ValueError(
                f"{error} Finished levels ({done}) are kept in {folder}: remove it to start anew."
            ) from None
        if not isinstance(error, KeyboardInterrupt) or not done:
            raise
        raise KeyboardInterrupt(
            f"finished levels ({done}) are kept in {folder}; the same command with --resume goes "
            "on from there"
        ) from None
    told_of = {
        "file": str(path),
        "windows": tokens.shape[0],
        "length": tokens.shape[1],
        "forward": forward,
        "compiled": made.compiled,
        "scalings": [
            {"fold": row.fold, "sites": list(row.sites), "scaling": row.scaling}
            | {"plain_loss": row.plain_loss, "loss": row.loss, "seconds": row.seconds}
            for row in made.scalings
        ],
        "unscaled": list(made.unscaled),
    }
    return made, told_of


def finished(out: pathlib.Path) -> None:
    """Removes what a calibration kept, once its result is written."""
    shutil.rmtree(run_folder(out), ignore_errors=True)


def run_folder(out: pathlib.Path) -> pathlib.Path:
    """Where finished levels and what does not fit into memory lie: beside `OUT`, never in it."""
    whole = out if out.name not in ("", "..") else out.resolve()
    return whole.with_name(f"{whole.name}.calibration")


def site_rows(made: Calibrated) -> dict[str, dict[str, Any]]:
    """What `--json` says of sites beside the account, by site; `None` where nothing is known."""
    unscaled = set(made.unscaled)
    rows: dict[str, dict[str, Any]] = {}
    for site in made.account.sites:
        notes = [_UNSCALED] if site.scaling is not None and site.path in unscaled else []
        rows[site.site] = {"nearest_error": None, "error": None, "seconds": None}
        rows[site.site] |= {"notes": notes, "folds": []}
    for row in made.sites:
        own = rows[row.site]
        own |= {"nearest_error": row.nearest_error, "error": row.error, "seconds": row.seconds}
        own["notes"] += row.notes
    for scaled in made.scalings:
        for site in scaled.sites:
            rows[site]["folds"].append(scaled.fold)
    return rows


def summary(made: Calibrated) -> list[str]:
    """Lines on the whole run."""
    pairs = [(row.nearest_error, row.error) for row in made.sites]
    ratios = [after / before for before, after in pairs if before and after]
    said = []
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        said.append(
            f"{len(ratios)} sites calibrated: on this data their outputs err {mean:.3f} times as "
            "much as rounded to nearest (geometric mean)"
        )
    if made.scalings:
        said.append(f"{len(made.scalings)} inputs scaled; the rows above say what took the factors")
    if made.unscaled:
        said.append(
            f"{len(made.unscaled)} inputs not scaled, since nothing makes them in proportion: "
            + ", ".join(made.unscaled)
        )
    return said


def _first(tokens: np.ndarray, arguments: argparse.Namespace) -> np.ndarray:
    if arguments.windows is None:
        return tokens
    if arguments.windows > len(tokens):
        raise ValueError(
            f"--windows {arguments.windows} is more than the {len(tokens)} windows of "
            f"{tokens.shape[1]} tokens in {arguments.calibration}. Give more data, or fewer "
            "windows."
        )
    return tokens[: arguments.windows]
