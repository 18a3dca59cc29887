"""Where the tensors of a checkpoint go: `load(sharding=)` as a function of a tensor's path."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from ..intercept._variables import COLLECTION
from ..qarray import QArray, shardings_like
from ._parts import parts_of, with_parts

Placement = (
    None | Sharding | Callable[[str], Sharding | None] | tuple[Mesh, Mapping[str, PartitionSpec]]
)
"""`None`: the default device. A sharding: for every tensor. A function: from a tensor's path to its
sharding. A mesh and patterns: the first that matches the path says how the tensor is cut."""


def placed_by(placement: Placement) -> Callable[[str], Sharding | None]:
    """The function that a placement stands for.

    What belongs to quantization rather than to the model is small: each device of a mesh gets all
    of it. No pattern has to speak of it.

    **Raises:** `TypeError` if it is none. The function raises `ValueError` for a path that no
    pattern matches.
    """
    of_model = _placed_by(placement)

    def place(path: str) -> Sharding | None:
        if not path.startswith(f"{COLLECTION}/"):
            return of_model(path)
        if isinstance(placement, tuple):
            return NamedSharding(placement[0], PartitionSpec())
        found = of_model(path)
        whole = isinstance(found, NamedSharding)
        return NamedSharding(found.mesh, PartitionSpec()) if whole else found

    return place


def _placed_by(placement: Placement) -> Callable[[str], Sharding | None]:
    if placement is None or isinstance(placement, Sharding):
        return lambda path: placement
    if isinstance(placement, tuple) and len(placement) == 2 and isinstance(placement[0], Mesh):
        mesh, rules = placement

        def by_rules(path: str) -> Sharding:
            for pattern, spec in rules.items():
                if fnmatch.fnmatchcase(path, pattern):
                    return NamedSharding(mesh, spec)
            raise ValueError(
                f"No pattern of {list(rules)} matches {path}. Add one; '*': PartitionSpec() puts "
                "what is left on every device."
            )

        return by_rules
    if callable(placement):
        return placement
    raise TypeError(
        "sharding= is a Sharding, a function from a path to one, or a mesh with patterns, not "
        f"{type(placement).__name__}."
    )


def part_shardings(path: str, shape: Any, sharding: Sharding | None) -> dict[str, Any]:
    """The sharding of each part of a tensor, by role.

    `shape` is an array's shape and dtype, or a QArray of them: its codes follow the weight, and
    scales and zero points as far as their tiles allow.

    **Raises:** `ValueError` naming the tensor if it cannot be cut so.
    """
    parts: dict[str, Any]
    try:
        if not isinstance(shape, QArray):
            parts, shapes = {"plain": sharding}, {"plain": shape}
        else:
            shapes = parts_of(shape)
            if isinstance(sharding, NamedSharding):
                parts = parts_of(shardings_like(shape, sharding))
            else:
                parts = dict.fromkeys(shapes, sharding)
        for role, part in parts.items():
            if part is not None:
                part.shard_shape(tuple(shapes[role].shape))
    except ValueError as error:
        raise ValueError(
            f"{path}, {_words(shape)}, cannot be placed by {sharding}: {error}"
        ) from None
    return parts


def _words(shape: Any) -> str:
    held = f" ({shape.scheme})" if isinstance(shape, QArray) else ""
    return f"shape {tuple(shape.shape)}{held}"


def assembled(shape: Any, parts: dict[str, Any]) -> Any:
    """The array or QArray of `shape` that is made of `parts`."""
    if not isinstance(shape, QArray):
        return parts["plain"]
    return with_parts(shape, parts)
