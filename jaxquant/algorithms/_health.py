"""How a run of GPTQ went: what is found in the compiled program, and what is told of it."""

import dataclasses
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Health:
    """How it went, for each entry of the stack.

    `damping` that was used is infinite where none made the Gram matrix positive definite; `dead`
    counts columns whose inputs were all 0; `solved` is whether a correction could be computed.
    """

    weight_finite: Any
    gram_finite: Any
    damping: Any
    dead: Any
    solved: Any


def told(health: Health, damping: float) -> tuple[str, ...]:
    """What the account should say.

    **Raises:** `ValueError` for numbers that are not finite.
    """
    health = jax.tree.map(np.asarray, health)
    for what, finite in (("weight", health.weight_finite), ("Gram matrix", health.gram_finite)):
        if not finite.all():
            raise ValueError(
                f"The {what}{_at(~finite)} holds NaN or infinity. "
                + (
                    "Repair the checkpoint, or leave this parameter by a rule."
                    if what == "weight"
                    else "The inputs of this site overflowed or held NaN: calibrate in float32, or "
                    "with other data."
                )
            )
    notes = []
    if health.dead.any():
        notes.append(
            f"columns of inputs that were always 0, rounded to nearest: {health.dead.sum()}"
        )
    more = (health.damping > np.float32(damping)) & np.isfinite(health.damping)
    if more.any():
        worst = float(health.damping[more].max())
        notes.append(
            f"the Gram matrix{_at(more)} was not positive definite with damping {damping:g}: "
            f"damped by {worst:g}"
        )
    lost = np.isinf(health.damping)
    if lost.any():
        notes.append(
            f"no damping made the Gram matrix{_at(lost)} positive definite: rounded to nearest"
        )
    unsolved = ~health.solved
    if unsolved.any():
        notes.append(
            f"the Gram matrix{_at(unsolved)} was too near to singular to make up for earlier levels"
        )
    return tuple(notes)


def _at(which: Any) -> str:
    """Where in a stack; nothing for a single weight."""
    if np.ndim(which) == 0:
        return ""
    found = np.argwhere(which)[0].tolist()
    return f" at {found[0] if len(found) == 1 else tuple(found)} of the stack"
