"""What is trained: data and pure functions. Nothing here knows of models or of quantization."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

Tree = Any


def _nothing(variables: Tree, carried: Tree) -> dict[str, float]:
    return {}


def _as_it_is(variables: Tree, gradients: Tree) -> tuple[Tree, Tree]:
    return variables, gradients


def _no_check(variables: Tree) -> None:
    return None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A loss, the variables to lower it by, and the examples of each step.

    - `loss(variables, carried, batch, fixed, key)`: the mean loss of a batch, and `carried` as it
      is after it. Parts of a batch are equally large, and weigh the same.
    - `variables`: a tree of floating-point arrays, all trained.
    - `carried`: a tree of arrays that the loss reads and writes without gradients, such as running
      means. It goes through the parts of a batch one after the other.
    - `between(variables, gradients)`: both, after a part's gradients and before they are summed:
      where what a backward pass saw moves variables by another way than the optimizer's.
    - `fixed`: a tree of arrays that the loss reads: a teacher, frozen codes. Not in checkpoints.
    - `batch(step)`: a tree of arrays `[batch, ...]`, by nothing but the step.
    - `evaluate(variables, carried)`: named scores, such as the loss on held-out data.
    - `check(variables)`: raises `ValueError` for values that cannot be gone on with.
    - `labels(variables)`: a tree of labels, for `optimizer.groups` of the settings.
    - `identity`: what tells this problem from others, as plain data; a checkpoint of another one is
      refused.
    """

    loss: Callable[[Tree, Tree, Tree, Tree, jax.Array], tuple[jax.Array, Tree]]
    variables: Tree
    batch: Callable[[int], Tree]
    carried: Tree = ()
    fixed: Tree = ()
    between: Callable[[Tree, Tree], tuple[Tree, Tree]] = _as_it_is
    evaluate: Callable[[Tree, Tree], dict[str, float]] = _nothing
    check: Callable[[Tree], None] = _no_check
    labels: Callable[[Tree], Tree] | None = None
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """All that a run is, between two steps. `step` is how many were done."""

    step: Any
    variables: Tree
    carried: Tree
    optimizer: Tree


class TrainingError(ValueError):
    """A run cannot go on; the message says why, and which checkpoint is good."""
