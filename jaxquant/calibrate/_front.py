"""`calibrate`: from a float model, data and a plan to a quantized tree."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..algorithms._nearest import quantized_tree
from ..intercept import Account, Plan, Root
from ..qarray import QArray
from ._batches import checked_batches
from ._driver import CalibratedSite, Calibration, Settings
from ._journal import digest_of, Journal
from ._roots import assembled
from ._store import Store

Progress = Callable[[CalibratedSite, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What `calibrate` made: the tree, its account, and what happened at each site, in order."""

    qvariables: Any
    account: Account
    sites: tuple[CalibratedSite, ...]


def calibrate(
    model: Any,
    variables: Any,
    batches: Iterable[Any],
    plan: Plan,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    settings: Settings = Settings(),  # noqa: B008  (a frozen value)
    progress: Progress | None = None,
) -> Calibrated:
    """Quantizes the parameters of `plan` with what the model makes of `batches`.

    Each batch is a tuple of the model's arguments. The model is gone through level by level (q, k
    and v of a block, then o, ...), each on what the quantized levels before it put out, so that
    each linear is evaluated once and memory holds one block, its statistics and a bounded part of
    the activations. With a folder `out`, finished levels are kept there, and a calibration that was
    stopped goes on with `resume`, to the same bytes; the folder is removed when all is done.
    `progress` is called with each site that is done, its level and the number of levels.

    **Raises:** `ValueError` for data that cannot be used, or a folder that does not fit;
    `PlanError` for a site that data cannot be had for.

    ```python
    plan = jq.plan(model, variables, tokens, recipe=jq.recipes.load("configs/gptq_w4_sym_g64.toml"))
    made = jq.calibrate(model, variables, [(tokens,)], plan, out="run/")
    qmodel = jq.wrap(model, plan)
    logits = qmodel.apply(made.qvariables, tokens)
    ```
    """
    data = checked_batches(batches)
    journal = None
    if out is not None:
        identity = {
            "plan": plan.fingerprint,
            "data": digest_of(data),
            "settings": repr(dataclasses.replace(settings, memory=0)),
        }
        journal = Journal(Path(out), identity, resume=resume)
    run = Calibration(
        model, variables, data, plan, settings=settings, journal=journal, progress=progress
    )
    with Store(settings.memory, out) as store:
        run.run(store)
    by_path: dict[str, dict[Root, QArray]] = {}
    for root, q in run.results.items():
        by_path.setdefault(root.path, {})[root] = q
    chosen = {path: assembled(slices, plan.by_path[path]) for path, slices in by_path.items()}
    tree, account = quantized_tree(variables, plan, chosen, account=True)
    assert account is not None
    if out is not None:
        shutil.rmtree(out)
    return Calibrated(qvariables=tree, account=account, sites=tuple(run.rows))
