"""What a run is, as TOML: a file each in configs/experiments/qat_smollm2."""

import dataclasses
from pathlib import Path

from training_loop import Loop, Optimizer, read_settings, Settings

import jaxquant as jq

CONFIGS = Path(__file__).parents[2] / "configs" / "experiments" / "qat_smollm2"


class Run(Settings):
    """One training of SmolLM2. Without `recipe` it is trained in float.

    The loss is `(1 - distillation) * NLL + distillation * KL(float || model)` (Hinton et al. 2015,
    temperature 1). `start` names the row whose codes training starts from, in place of the float
    weights. With `adapters` weights are rounded and frozen, and only adapters are trained.
    """

    what: str
    loop: Loop
    optimizer: Optimizer
    recipe: str | None = None
    distillation: float = 0.0
    start: str | None = None
    adapters: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """A run with its name, which is that of its file, and its recipe."""

    name: str
    run: Run
    recipe: jq.Recipe | None


def read_run(name: str, folder: Path = CONFIGS) -> Named:
    """The run that a file describes.

    **Raises:** `ValueError` for a name without a file, or for what is wrong in it.
    """
    path = folder / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise ValueError(f"There is no run {name!r} in {folder}. Those that are: {known}.")
    run = read_settings(path, Run)
    recipe = None if run.recipe is None else jq.recipes.load(folder / run.recipe)
    if not 0 <= run.distillation <= 1:
        raise ValueError(f"{path}: distillation is a share from 0 to 1, not {run.distillation}.")
    if run.adapters and (recipe is None or run.start is not None):
        raise ValueError(f"{path}: adapters stand beside what a recipe rounds. Give one, no start.")
    return Named(name=name, run=run, recipe=recipe)
