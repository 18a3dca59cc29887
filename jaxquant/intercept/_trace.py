"""From a function of variables to its evaluation with QArrays in place of parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ..qarray import is_qarray, QArray
from ._evaluate import Evaluator, shape_of
from ._weight import is_weight, Weight, whole

Named = tuple[str, Any]


@dataclasses.dataclass(frozen=True)
class Untouched:
    """Stands for a variable, by its place among the leaves, that comes back as it went in."""

    place: int


def set_aside(before: Any, after: Any) -> Any:
    """`after` with `Untouched` for leaves that are the very values of `before`.

    So a QArray that nobody wrote to comes back as a QArray, and costs nothing.
    """
    places = {id(x): i for i, x in enumerate(jax.tree.leaves(before))}
    return jax.tree.map(lambda x: Untouched(places[id(x)]) if id(x) in places else x, after)


def put_back(before: Any, after: Any) -> Any:
    """Undoes `set_aside`, with the values of `before`, in which a QArray is one leaf."""
    leaves = jax.tree.leaves(before, is_leaf=is_qarray)
    return jax.tree.map(lambda x: leaves[x.place] if isinstance(x, Untouched) else x, after)


class Static:
    """Stands where an output or argument is not an array."""

    def __init__(self, value: Any):
        self.value = value


def is_array(x: Any) -> bool:
    """Whether a leaf is traced; Python scalars, strings and functions stay what they are.

    A Python scalar keeps its weak type, and may steer Python control flow, only if it stays one.
    """
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def run(
    function: Callable[..., Any],
    variables: Any,
    paths: Sequence[str | None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    evaluator: Evaluator,
    tracked: Callable[[str, Any], bool],
) -> Any:
    """`function(variables, *args, **kwargs)`, evaluated by `evaluator`.

    `paths` names the leaves of `variables` (a QArray is one leaf) that are parameters, `None` for
    the others. Leaves for which `tracked(path, leaf)` holds enter as weights.
    """
    leaves, tree = jax.tree.flatten(variables, is_leaf=is_qarray)
    arguments, argument_tree = jax.tree.flatten((args, kwargs))
    moving = [i for i, x in enumerate(arguments) if is_array(x)]
    out_tree: list[Any] = []

    def traced(leaves: list[Any], moved: list[Any]) -> list[Any]:
        full = list(arguments)
        for i, x in zip(moving, moved, strict=True):
            full[i] = x
        args, kwargs = jax.tree.unflatten(argument_tree, full)
        out = function(jax.tree.unflatten(tree, leaves), *args, **kwargs)
        outs, structure = jax.tree.flatten(out)
        arrays = [x for x in outs if is_array(x)]
        out_tree[:] = [structure, [None if is_array(x) else Static(x) for x in outs]]
        return arrays

    logical = [shape_of(x) if isinstance(x, QArray) else x for x in leaves]
    moved = [arguments[i] for i in moving]
    closed = jax.make_jaxpr(traced)(logical, moved)
    values = [
        whole(x, path) if path is not None and tracked(path, x) else x
        for path, x in zip(paths, leaves, strict=True)
    ]
    results = evaluator.closed(closed, [*_arrays(values), *moved], ())
    outs = iter(
        evaluator.mode.leave(x, None, "the model returns it") if is_weight(x) else x
        for x in results
    )
    structure, slots = out_tree
    return jax.tree.unflatten(
        structure, [next(outs) if slot is None else slot.value for slot in slots]
    )


def _arrays(values: list[Any]) -> list[Any]:
    """One value for each input of the jaxpr: leaves that are pytrees of nothing vanish."""
    result = []
    for value in values:
        if isinstance(value, (Weight, QArray)):
            result.append(value)
        else:
            result += jax.tree.leaves(value)
    return result
