"""`calibrate`: from a float model, data and a plan to a quantized tree."""

import ctypes
import dataclasses
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ..algorithms._nearest import quantized_tree
from ..intercept import Account, Plan, Root
from ..intercept._variables import parameters, unstamped
from ..qarray import is_qarray
from ._batches import checked_batches
from ._devices import Devices, in_units
from ._driver import CalibratedSite, Quantization
from ._journal import digest_of, Journal, weights_digest
from ._roots import assembled_state
from ._scaling import Scaled, Scaling
from ._settings import Settings
from ._store import Store

Progress = Callable[[CalibratedSite | Scaled, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What `calibrate` made: the tree, its account, and what happened at each site, in order.

    `scalings` are the groups of sites whose inputs were scaled; `unscaled` the parameters of sites
    that were to be, and whose inputs nothing makes that could be divided. `compiled` counts the
    programs that segments of the model were compiled to.
    """

    qvariables: Any
    account: Account
    sites: tuple[CalibratedSite, ...]
    scalings: tuple[Scaled, ...] = ()
    unscaled: tuple[str, ...] = ()
    compiled: int = 0


def calibrate(
    model: Any,
    variables: Any,
    batches: Iterable[Any],
    plan: Plan,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    keep: bool = False,
    settings: Settings = Settings(),  # noqa: B008  (a frozen value)
    mesh: Mesh | None = None,
    axis: str = "data",
    progress: Progress | None = None,
) -> Calibrated:
    """Quantizes the parameters of `plan` with what the model makes of `batches`.

    Each batch is a tuple of the model's arguments. The model is gone through level by level (q, k
    and v of a block, then o, ...), each on what the quantized levels before it put out, so that
    each linear is evaluated once and memory holds one block, its statistics and a bounded part of
    the activations. With a folder `out`, finished levels are kept there, and a calibration that was
    stopped goes on with `resume`, to the same bytes; the folder is removed when all is done.
    With `keep` it stays, and the result's codes in it: they are read whenever they are asked for,
    as by `save`, so that memory never holds all of them; parameters that were lazy stay so.
    With a `mesh`, data are dealt out over the devices along its `axis`, and rows of weights too;
    set `settings.unit` for codes that do not depend on how many these are. `progress` is called
    with each site that is done, its level and the number of levels.

    **Raises:** `ValueError` for data that cannot be used, or a folder of another calibration;
    `TypeError` for batches that are no tuples; `PlanError` for a site that data cannot be had for;
    `CheckpointError` for a damaged folder, `OSError` for one that cannot be written.

    ```python
    plan = jq.plan(model, variables, tokens, recipe=jq.recipes.load("configs/gptq_w4_sym_g64.toml"))
    made = jq.calibrate(model, variables, [(tokens,)], plan, out="run/")
    qmodel = jq.wrap(model, plan)
    logits = qmodel.apply(made.qvariables, tokens)
    ```
    """
    if out is None and (resume or keep):
        raise ValueError("resume and keep are about a folder of the run. Give out=, or neither.")
    folder = None if out is None else Path(out).resolve()
    given, _ = unstamped(variables)
    if held := [path for path, leaf in parameters(given).items() if is_qarray(leaf)]:
        raise ValueError(
            f"{held[0]} is quantized already, and {len(held) - 1} other parameters. Calibrate the "
            "float variables."
        )
    data = checked_batches(batches)
    if settings.unit is not None:
        data = in_units(data, settings.unit)
    devices = None if mesh is None else Devices(mesh=mesh, axis=axis, unit=settings.unit)
    journal = None
    if folder is not None:
        identity = {
            "plan": plan.fingerprint,
            "data": digest_of(data),
            "weights": weights_digest(given),
            "settings": repr(dataclasses.replace(settings, memory=0)),
            "devices": str(1 if devices is None or settings.unit is not None else devices.count),
        }
        journal = Journal(folder, identity, resume=resume)
    scalings: list[Scaled] = []
    unscaled: tuple[str, ...] = ()
    unfolded: dict[tuple[str, Root], Any] = {}
    scaled = 0
    with Store(settings.memory, folder) as store:
        if any(site.scaling is not None for site in plan.sites):
            # One device: a sample has to be the same on any number of them.
            lent = None if settings.unit is not None else devices
            scaling = Scaling(
                plan, model, variables, data, store, settings, progress, lent, journal
            )
            variables = scaling.run()
            scalings, unscaled = scaling.rows, scaling.without_fold
            unfolded, scaled = scaling.unfolded, scaling.walk.programs.compiled
        known = parameters(unstamped(variables)[0])
        run = Quantization(plan, known, settings, journal, progress, devices)
        run.smooth(unfolded)
        programs = run.run(model, variables, data, store)
    _trim()
    states = {
        site: assembled_state(own, plan.by_path[plan.by_site[site].path])
        for site, own in run.states.items()
    }
    lazily = keep and journal is not None
    chosen = run.results.lazily() if lazily else run.results.by_path()
    tree, account = quantized_tree(variables, plan, chosen, states, account=True, lazily=lazily)
    assert account is not None
    account = dataclasses.replace(account, notes=_notes(scalings, unscaled, run.rows))
    _trim()
    if folder is not None and not keep:
        _remove(folder)
    return Calibrated(
        qvariables=tree,
        account=account,
        sites=tuple(run.rows),
        scalings=tuple(scalings),
        unscaled=unscaled,
        compiled=scaled + programs.compiled,
    )


def _remove(folder: Path) -> None:
    """Removes the folder of a run; what was made is not lost where that fails."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        warnings.warn(f"{folder} could not be removed: {error}. Remove it.", stacklevel=3)


def _notes(
    scalings: list[Scaled], unscaled: tuple[str, ...], rows: list[CalibratedSite]
) -> tuple[str, ...]:
    """What an account says beside how each weight is held."""
    notes = [f"scaled by {row.scaling}: {row.fold}" for row in scalings]
    notes += [
        f"{root}: its input is not scaled: nothing makes it in proportion" for root in unscaled
    ]
    sites: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            sites.setdefault(note, []).append(row.root)
    for note, roots in sites.items():
        others = f" and {len(roots) - 1} more" if len(roots) > 1 else ""
        notes.append(f"{roots[0]}{others}: {note}")
    return tuple(notes)


def _trim() -> None:
    """Gives what was freed back to the system: glibc keeps what lies between arrays in use, which
    after a calibration is some 0.5 GB."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
