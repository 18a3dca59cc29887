"""The codes that are chosen so far: in memory, or in the journal where there is one."""

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint import LazyArray
from ..intercept import LeafPlan, Plan, Root
from ..qarray import abstract_qarray, QArray
from ._journal import Journal
from ._roots import assembled, RootPlan

ALWAYS = sys.maxsize
"""The level of what no journal has: it is held to the end."""


class Results:
    """QArrays by root. With a journal, those of earlier levels are read when they are asked for."""

    def __init__(self, plan: Plan, journal: Journal | None):
        self.plan = plan
        self.journal = journal
        self._held: dict[Root, QArray] = {}
        self._level: dict[Root, int] = {}

    def __contains__(self, root: Root) -> bool:
        return root in self._level

    def __getitem__(self, root: Root) -> QArray:
        if root in self._held:
            return self._held[root]
        return self.read(self._level[root], [root])[0][root]

    def put(self, level: int, results: Mapping[Root, QArray]) -> None:
        """Adds what was chosen at a level."""
        self._held |= results
        self._level |= dict.fromkeys(results, level)

    def finish(self, level: int) -> None:
        """Forgets what was chosen before this level, if it can be read again."""
        if self.journal is not None:
            self._held = {r: q for r, q in self._held.items() if self._level[r] >= level}

    def read(self, level: int, roots: Iterable[Root]) -> tuple[dict[Root, QArray], Any, Any]:
        """What the journal has of a level: codes of these roots, what is told of it, and states."""
        assert self.journal is not None
        structs = {}
        for root in roots:
            planned = RootPlan(leaf=self.plan.by_path[root.path], root=root)
            structs[root] = abstract_qarray(
                planned.shape,
                np.dtype(planned.leaf.dtype),
                planned.leaf.scheme,
                **planned.roles,
            )
        named = {str(root): struct for root, struct in structs.items()}
        held, rows, states = self.journal.read(level, named)
        arrays = {root: jax.tree.map(jnp.asarray, held[str(root)]) for root in structs}
        return arrays, rows, states

    def by_path(self) -> Mapping[str, QArray]:
        """The QArrays of whole parameters, each put together when it is asked for."""
        return _Parameters(self)

    def lazily(self) -> dict[str, QArray]:
        """As `by_path`, of parts that are read from the journal whenever someone asks for them."""
        assert self.journal is not None
        held = self.by_path()
        return {path: _lazy(held, self.plan.by_path[path]) for path in held}

    def roots(self) -> Mapping[str, list[Root]]:
        """Those that codes were chosen for, by the path of their parameter."""
        found: dict[str, list[Root]] = {}
        for root in self._level:
            found.setdefault(root.path, []).append(root)
        return found


class _Parameters(Mapping[str, QArray]):
    def __init__(self, results: Results):
        self._results = results
        self._roots = results.roots()

    def __getitem__(self, path: str) -> QArray:
        slices = {root: self._results[root] for root in self._roots[path]}
        return assembled(slices, self._results.plan.by_path[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._roots)

    def __len__(self) -> int:
        return len(self._roots)


def _lazy(held: Mapping[str, QArray], leaf: LeafPlan) -> QArray:
    parts, tree = jax.tree.flatten(leaf.abstract)

    def read(number: int) -> np.ndarray:
        return np.asarray(jax.tree.leaves(held[leaf.path])[number])

    lazy = [
        LazyArray(
            shape=tuple(part.shape),
            dtype=np.dtype(part.dtype),
            load=functools.partial(read, number),
            name=leaf.path,
        )
        for number, part in enumerate(parts)
    ]
    return jax.tree.unflatten(tree, lazy)
