"""How arrays nest in a tree of variables, as plain data, and back. See docs/format.md, "Tree".

What is restored is made of types on a list, looked up by name; nothing in a file names code.
"""

import dataclasses
from typing import Any

import jax
from flax import linen as nn, nnx
from flax.core import FrozenDict
from jax.sharding import PartitionSpec

from ..intercept import PlanStamp
from ..intercept._boxes import named_by_leaf, QUANTIZED
from ..intercept._variables import COLLECTION, named_leaves, QuantizationState, stamped, unstamped
from ..qarray import is_qarray
from ._errors import CheckpointError

_NNX = (
    "BatchStat Cache Intermediate LoRAParam OptArray OptState OptVariable Param Perturbation "
    "RngCount RngKey RngState Variable"
)
VARIABLES: dict[str, type[Any]] = {
    f"flax.nnx.{name}": getattr(nnx, name) for name in _NNX.split() if hasattr(nnx, name)
} | {"jaxquant.QuantizationState": QuantizationState}
BOXES: dict[str, type[Any]] = {
    "flax.linen.Partitioned": nn.Partitioned,
    "flax.linen.LogicallyPartitioned": nn.LogicallyPartitioned,
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Leaf:
    """An array or QArray of a tree, with the path that plans know it by."""

    path: str
    parameter: bool
    value: Any


def describe(variables: Any) -> tuple[dict[str, Any], list[Leaf]]:
    """The tree as plain data, in which leaves are numbers, and the leaves by those numbers.

    **Raises:** `TypeError` naming the first thing in the tree that cannot be stored.
    """
    leaves: list[Leaf] = []
    is_nnx = isinstance(variables, nnx.State)

    def items(mapping: Any, names: tuple[str, ...], parameter: bool) -> list[list[Any]]:
        for key in mapping:
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise TypeError(
                    f"{'/'.join(names) or 'The tree'} has the key {key!r}; keys are str or int."
                )
        return [[key, node(mapping[key], (*names, str(key)), parameter)] for key in mapping]

    def node(value: Any, names: tuple[str, ...], parameter: bool) -> dict[str, Any]:
        if value is None:
            return {"none": True}
        if isinstance(value, PlanStamp):
            return {"plan_stamp": True}
        if isinstance(value, nnx.State):
            return {"state": items(value.raw_mapping, names, parameter)}
        if isinstance(value, nnx.Variable):
            inner = node(value.get_value(), names, isinstance(value, nnx.Param))
            return {"variable": _name_of(type(value), VARIABLES), **_metadata(value), "of": inner}
        if isinstance(value, nn.meta.AxisMetadata):
            # Not `unbox`, which constrains the sharding of what it returns.
            (content,) = jax.tree.leaves(value, is_leaf=lambda x: x is not value)
            inner = node(content, names, parameter)
            return {"box": _name_of(type(value), BOXES), **_names(value), "of": inner}
        if isinstance(value, FrozenDict):
            return {"frozen_dict": items(value, names, parameter)}
        if isinstance(value, dict):
            return {"dict": items(value, names, parameter)}
        if type(value) in (list, tuple):
            kind = type(value).__name__
            return {kind: [node(x, (*names, str(i)), parameter) for i, x in enumerate(value)]}
        in_params = not is_nnx and names[:1] == ("params",)
        path = "/".join(names[1:] if in_params else names)
        if not is_qarray(value) and not _is_array(value):
            raise TypeError(
                f"{path} is a {type(value).__name__}, which a checkpoint does not hold: arrays and "
                "QArrays in dicts, lists, tuples and flax.nnx.State. Make it an array, or keep it "
                "in metadata."
            )
        leaves.append(Leaf(path=path, parameter=in_params or parameter, value=value))
        return {"tensor": len(leaves) - 1}

    return node(variables, (), is_nnx), leaves


def _is_array(value: Any) -> bool:
    """Whether `numpy.asarray` can read it (or it is a random key); lazily loaded arrays count."""
    return isinstance(value, jax.Array) or all(
        hasattr(value, name) for name in ("__array__", "shape", "dtype")
    )


def build(tree: dict[str, Any], values: dict[int, Any], fingerprint: str) -> Any:
    """The tree that `describe` described, with `values` as leaves.

    **Raises:** `CheckpointError` for what cannot be made again without a template.
    """

    def node(data: dict[str, Any]) -> Any:
        kind = next(iter(data))
        content = data[kind]
        match kind:
            case "none":
                return None
            case "plan_stamp":
                return PlanStamp(fingerprint)
            case "tensor":
                return values[content]
            case "list":
                return [node(x) for x in content]
            case "tuple":
                return tuple(node(x) for x in content)
            case "dict" | "frozen_dict" | "state":
                mapping = {key: node(x) for key, x in content}
                if kind == "frozen_dict":
                    return FrozenDict(mapping)
                return nnx.State(mapping) if kind == "state" else mapping
            case "variable":
                _require(data, content, VARIABLES)
                metadata = {key: _decoded(x) for key, x in data["metadata"]}
                return VARIABLES[content].from_metadata(node(data["of"]), metadata)
            case "box":
                _require(data, content, BOXES)
                return BOXES[content](node(data["of"]), names=_decoded(data["names"]))
        raise CheckpointError(
            f"The manifest's tree has a node of kind {kind!r}, which this jaxquant does not know. "
            "Install a newer jaxquant."
        )

    return named_by_leaf(node(tree))


def fill(
    template: Any, tree: dict[str, Any], leaves: list[tuple[str, bool, Any]], fingerprint: str
) -> Any:
    """`template` with each leaf replaced by the loaded one of the same path.

    Quantization's own collection, which no template has, comes from `tree`.

    **Raises:** `CheckpointError` naming leaves that either side lacks, or of another shape.
    """
    template, _ = unstamped(template)
    flat, structure = jax.tree.flatten(template, is_leaf=is_qarray)
    wanted = [(path, parameter) for path, parameter, _ in named_leaves(template)]
    held = {(path, parameter): value for path, parameter, value in leaves}
    own = {key for key in held if key[0].startswith(f"{COLLECTION}/")}
    for keys, lack in (
        (set(wanted) - set(held), "the template has {} and the checkpoint does not"),
        (set(held) - set(wanted) - own, "the checkpoint has {} and the template does not"),
    ):
        if keys:
            raise CheckpointError(
                f"The template does not fit: {lack.format(min(keys)[0])} ({len(keys)} such). Give "
                "the variables of the model that was saved, or no template."
            )
    for (path, parameter), leaf in zip(wanted, flat, strict=True):
        found = held[path, parameter]
        if tuple(leaf.shape) != tuple(found.shape):
            raise CheckpointError(
                f"{path} has shape {tuple(leaf.shape)} in the template and {tuple(found.shape)} in "
                "the checkpoint. Give the variables of the model that was saved."
            )
    filled = stamped(jax.tree.unflatten(structure, [held[key] for key in wanted]), fingerprint)
    values = {i: value for i, (_, _, value) in enumerate(leaves)}
    ((kind, items),) = tree.items()
    ours = build({kind: [item for item in items if item[0] == COLLECTION]}, values, fingerprint)
    if isinstance(filled, nnx.State):
        return nnx.State({**filled.raw_mapping, **ours.raw_mapping})
    return {**filled, **ours}


def _name_of(kind: type[Any], known: dict[str, type[Any]]) -> str:
    """The name of a type on the list, or else what it is called, which only a template restores."""
    names = {each: name for name, each in known.items()}
    # What stands around a QArray is written as what Flax calls it.
    kind = next((plain for plain, ours in QUANTIZED.items() if ours is kind), kind)
    return names.get(kind, f"{kind.__module__}.{kind.__qualname__}")


def _metadata(variable: Any) -> dict[str, Any]:
    kept, lost = [], []
    for key, value in variable.get_metadata().items():
        try:
            kept.append([key, _encoded(value)])
        except TypeError:
            lost.append(key)
    return {"metadata": kept, "lost": lost}


def _names(box: Any) -> dict[str, Any]:
    names = getattr(box, "names", ())
    lost = [key for key in ("mesh", "rules") if getattr(box, key, None) is not None]
    return {"names": _encoded(tuple(names)), "lost": lost}


def _require(data: dict[str, Any], name: str, known: dict[str, type[Any]]) -> None:
    if name not in known or data["lost"]:
        what = f"its metadata {data['lost']}" if name in known else "its type"
        raise CheckpointError(
            f"The tree holds a {name}, and {what} cannot be read from a file. Give a tree to "
            "fill: template=nnx.state(model), or what jax.eval_shape makes of model.init."
        )


def _encoded(value: Any) -> Any:
    """Metadata as JSON that tells tuples from lists.

    **Raises:** `TypeError` for values that JSON cannot hold.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, PartitionSpec):
        return {"partition_spec": [_encoded(each) for each in value]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encoded(each) for each in value]}
    if type(value) is dict:
        return {"dict": [[_encoded(key), _encoded(each)] for key, each in value.items()]}
    raise TypeError(f"{type(value).__name__} cannot be stored as JSON.")


def _decoded(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "dict":
        return {_decoded(key): _decoded(each) for key, each in content}
    made = [_decoded(each) for each in content]
    match kind:
        case "list":
            return made
        case "tuple":
            return tuple(made)
        case "partition_spec":
            return PartitionSpec(*made)
    raise CheckpointError(f"The manifest holds metadata of the unknown kind {kind!r}.")
