"""What runs are, as TOML, and what they may compute in."""

import pathlib

from training_loop import Loop, Optimizer, Settings

CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "experiments" / "fp8_training"
FLOATS = ("float32", "bfloat16")
RECIPES = tuple(f"fp8_train_{kind}" for kind in ("delayed", "current", "row", "block", "mx"))
ARITHMETIC = (*FLOATS, *RECIPES)
"""What a run computes in. Recipes compute in bfloat16 what they leave."""


class Training(Settings):
    """The settings file `training.toml`, which all runs share."""

    loop: Loop
    optimizer: Optimizer
