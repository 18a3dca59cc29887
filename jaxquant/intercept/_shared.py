"""Statistics that several sites share: handed out of compiled functions once, not once a site."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """A tree in which one array may stand at several places, as each array once.

    A compiled function (or a scan) would return a copy for every place.
    """

    arrays: tuple[Any, ...]
    places: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    tree: Any = dataclasses.field(metadata={"static": True})


def share(tree: Any) -> Shared:
    """Finds the arrays that stand at several places: the same object, not the same values."""
    leaves, structure = jax.tree.flatten(tree)
    numbers: dict[int, int] = {}
    places = tuple(numbers.setdefault(id(leaf), len(numbers)) for leaf in leaves)
    arrays = {place: leaf for place, leaf in zip(places, leaves, strict=True)}
    return Shared(
        arrays=tuple(arrays[i] for i in range(len(arrays))), places=places, tree=structure
    )


def unshare(shared: Shared) -> Any:
    """The tree, with one object at all places of an array."""
    return jax.tree.unflatten(shared.tree, [shared.arrays[place] for place in shared.places])
