"""From a function of variables to its evaluation with QArrays in place of parameters."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..qarray import is_qarray, QArray, relayout
from ._dependence import dependence
from ._evaluate import Evaluator, shape_of
from ._weight import is_weight, Weight, whole

Named = tuple[str, Any]


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
    states: Mapping[str, tuple[Any, Any]] = {},
    trained: Mapping[str, tuple[Any, QArray]] = {},
) -> Any:
    """`function(variables, *args, **kwargs)`, evaluated by `evaluator`.

    The function returns its output and the variables that it hands back, in any structure. Among
    these a weight that nobody wrote to comes back as it went in; in the output it is an array.

    `paths` names the leaves of `variables` (a QArray is one leaf) that are parameters, `None` for
    the others. Leaves for which `tracked(path, leaf)` holds enter as weights, with their `states`
    (what `Weight` calls `state` and `state_axes`) by path. In training, `trained` has for each of
    them the array that gradients are to reach, and the codes that were made of it.
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
        out, written = function(jax.tree.unflatten(tree, leaves), *args, **kwargs)
        outs, structure = jax.tree.flatten((out, written))
        arrays = [x for x in outs if is_array(x)]
        slots = [None if is_array(x) else Static(x) for x in outs]
        out_tree[:] = [structure, slots, sum(map(is_array, jax.tree.leaves(out)))]
        return arrays

    logical = [shape_of(x) if isinstance(x, QArray) else x for x in leaves]
    moved = [arguments[i] for i in moving]
    closed = jax.make_jaxpr(traced)(logical, moved)

    def entering(path: str, x: Any) -> Weight:
        anchor, held = trained.get(path, (None, x))
        weight = whole(held, path).with_state(*states.get(path, ({}, ())))
        return dataclasses.replace(weight, trained=anchor)

    values = [
        entering(path, x) if path is not None and tracked(path, x) else x
        for path, x in zip(paths, leaves, strict=True)
    ]
    moving_inputs = [
        path is None
        for path, leaf in zip(paths, logical, strict=True)
        for _ in jax.tree.leaves(leaf)
    ]
    evaluator.dependence = dependence(
        closed,
        [*moving_inputs, *(True for _ in moved)],
        with_products=evaluator.mode.products,
    )
    results = evaluator.closed(closed, [*_arrays(values), *moved], ())
    structure, slots, count = out_tree
    whole_leaves = dict(zip(paths, leaves, strict=True))

    def result(i: int, x: Any) -> Any:
        if not is_weight(x):
            return x
        kept = i >= count and isinstance(x, Weight)
        handed_back = _as_it_was(x, whole_leaves[x.path]) if kept else None
        if handed_back is None:
            return evaluator.leave(x, None, "the model returns it")
        return handed_back

    outs = iter([result(i, x) for i, x in enumerate(results)])
    return jax.tree.unflatten(
        structure, [next(outs) if slot is None else slot.value for slot in slots]
    )


def _as_it_was(weight: Weight, leaf: Any) -> Any:
    """The value of `weight` held as `leaf` is; `None` if it is only a part of it."""
    if weight.shape != tuple(leaf.shape) or weight.via is not None:
        return None
    if not isinstance(leaf, QArray):
        return weight.value if weight.trained is None else weight.trained
    q = relayout(weight.value, leaf.layout)
    return q if q.scale.shape == leaf.scale.shape else None


def _arrays(values: list[Any]) -> list[Any]:
    """One value for each input of the jaxpr: leaves that are pytrees of nothing vanish."""
    result = []
    for value in values:
        if isinstance(value, (Weight, QArray)):
            result.append(value)
        else:
            result += jax.tree.leaves(value)
    return result
