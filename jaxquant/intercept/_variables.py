"""The variables of a model, Linen's nested dictionaries and NNX's states alike."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from ..qarray import is_qarray
from ._boxes import named_by_leaf

COLLECTION = "jaxquant"
"""Where what belongs to quantization, but not to the model, lives in a tree of variables."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PlanStamp:
    """The fingerprint of the plan that a tree was quantized by, as a part of its structure.

    Two plans may hold identical QArrays (weights of W8A8 and W8A16). As they must not share a
    compiled function, the trees differ in their static part, which is what `jit` looks at.
    """

    fingerprint: str


class QuantizationState(nnx.Variable):
    """State that belongs to quantization rather than to the model."""

    def replace(self, *args: Any, **updates: Any) -> Any:
        # The stamp is structure: `nnx.get_partition_spec`, which finds no array, leaves it be.
        if args == (None,) and isinstance(self.get_raw_value(), PlanStamp):
            return self.copy(**updates)
        return self.copy(*args, **updates)


def named_leaves(variables: Any) -> Iterator[tuple[str, bool, Any]]:
    """Path, whether it is a parameter, and value, in the order of `jax.tree.flatten`.

    Paths leave out what holds the value: the collection `params`, boxes of metadata, Variables.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(
        variables, is_leaf=lambda x: is_qarray(x) or isinstance(x, nnx.Variable)
    )
    is_nnx = isinstance(variables, nnx.State)
    for keys, leaf in flat:
        names = [_name(key) for key in keys if not _is_box(key)]
        parameter = is_nnx
        if not is_nnx:
            parameter = names[:1] == ["params"]
            names = names[1:] if parameter else names
        if isinstance(leaf, nnx.Variable):
            parameter = isinstance(leaf, nnx.Param)
            for value in jax.tree.leaves(leaf.get_value(), is_leaf=is_qarray):
                yield "/".join(names), parameter, value
        else:
            yield "/".join(names), parameter, leaf


def _is_box(key: Any) -> bool:
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value"


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def leaf_paths(variables: Any) -> list[str | None]:
    """For each leaf (a QArray is one), its path if it is a parameter, else `None`."""
    return [path if parameter else None for path, parameter, _ in named_leaves(variables)]


def map_leaves(function: Callable[[str | None, Any], Any], variables: Any) -> Any:
    """The same tree with `function(path, leaf)` for each leaf; `path` is `None` off `params`."""
    leaves, tree = jax.tree.flatten(variables, is_leaf=is_qarray)
    paths = leaf_paths(variables)
    return jax.tree.unflatten(tree, [function(p, x) for p, x in zip(paths, leaves, strict=True)])


def parameters(variables: Any) -> dict[str, Any]:
    """The parameters by path.

    **Raises:** `ValueError` where two parameters have the same path.
    """
    result: dict[str, Any] = {}
    for path, parameter, leaf in named_leaves(variables):
        if parameter and path in result:
            raise ValueError(
                f"Two parameters are called {path!r}: a name of one holds a slash. Rename it, "
                "since rules could not tell them apart."
            )
        if parameter:
            result[path] = leaf
    return result


def stamped(
    variables: Any,
    fingerprint: str,
    states: Mapping[str, Mapping[str, Any]] | None = None,
    learned: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """The tree with the stamp of a plan, and with names of axes that codes and scales share.

    `states` are arrays that belong to sites, by site id and name (see `_states`); `learned` those
    that are trained beside weights, by path and name.
    """
    own: dict[str, Any] = {"plan": PlanStamp(fingerprint)}
    if states:
        own["sites"] = {site: dict(arrays) for site, arrays in states.items()}
    if learned:
        own["weights"] = {path: dict(arrays) for path, arrays in learned.items()}
    variables = named_by_leaf(variables)
    if isinstance(variables, nnx.State):
        held = jax.tree.map(QuantizationState, own, is_leaf=lambda x: not isinstance(x, dict))
        return nnx.State({**variables.raw_mapping, COLLECTION: held})
    return {**dict(variables), COLLECTION: own}


def unstamped(variables: Any) -> tuple[Any, str | None]:
    """The model's own variables, and the fingerprint of the plan they were quantized by."""
    if COLLECTION not in variables:
        return variables, None
    is_nnx = isinstance(variables, nnx.State)
    # As it is stored: a State hands out its parts as States, which would be another structure.
    own = dict(variables.raw_mapping if is_nnx else variables)
    stamp = own.pop(COLLECTION)["plan"]
    if is_nnx:
        return nnx.State(own), stamp.get_value().fingerprint
    return own, stamp.fingerprint


def states_of(variables: Any) -> dict[str, dict[str, Any]]:
    """What `stamped` was given as `states`."""
    return _own(variables, "sites")


def learned_of(variables: Any) -> dict[str, dict[str, Any]]:
    """What `stamped` was given as `learned`."""
    return _own(variables, "weights")


def _own(variables: Any, what: str) -> dict[str, dict[str, Any]]:
    if COLLECTION not in variables:
        return {}
    held = variables.raw_mapping if isinstance(variables, nnx.State) else variables
    found = held[COLLECTION].get(what, {})

    def value(x: Any) -> Any:
        return x.get_value() if isinstance(x, nnx.Variable) else x

    return {name: {n: value(x) for n, x in arrays.items()} for name, arrays in found.items()}
