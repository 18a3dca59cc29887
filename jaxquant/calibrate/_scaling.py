"""Scalings: inputs of sites divided by factors that go into the weights, chosen from data.

A pass of its own over the float model. What the inputs are divided by is folded into the parameters
that make them, where the graph shows such parameters, so that the model computes what it did.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..algorithms import (
    apply_folds,
    as_matrix,
    AWQ,
    choose,
    from_matrix,
    rounded_at,
    scaling_losses,
    smoothed_losses,
    SmoothQuant,
)
from ..intercept import find_folds, Fold, mean_magnitude, Plan, PlanError, Root, Step, tie
from ..intercept._inputs import inputs_of
from ..intercept._rows import values as values_of_rows
from ..qarray import Scheme
from ._compiled import Programs
from ._devices import Devices, local
from ._journal import Journal
from ._roots import root_array, RootPlan
from ._segments import marked, moving_side, Part, part_of, Segment
from ._settings import Settings
from ._store import Store
from ._walk import Statistics, Walk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled:
    """What a scaling did to one group of sites that read the same input.

    `fold` says into what the factors went. `plain_loss` and `loss` are those of the objective, for
    the group as it was and with the factors that were chosen; `None` where nothing is searched.
    """

    scaling: str
    fold: str
    sites: tuple[str, ...]
    plain_loss: float | None
    loss: float | None
    seconds: float


class Scaling:
    """Goes through the float model and chooses factors for each fold."""

    def __init__(
        self,
        plan: Plan,
        model: Any,
        variables: Any,
        batches: Sequence[tuple[Any, ...]],
        store: Store,
        settings: Settings,
        progress: Callable[[Scaled, int, int], None] | None = None,
        devices: Devices | None = None,
        journal: Journal | None = None,
    ):
        self.plan = plan
        self.settings = settings
        self.progress = progress
        self.journal = journal
        self.rows: list[Scaled] = []
        self.chosen: list[tuple[Fold, Any]] = []
        self.unfolded: dict[tuple[str, Root], Any] = {}
        self.walk = Walk(
            model,
            variables,
            batches,
            store,
            Programs(devices),
            wanted=lambda mark: self._scaling(mark.site) is not None,
            observers=lambda mark: tuple(self._scaling(mark.site).observers),  # type: ignore
            effective=lambda root: root_array(self.walk.known, root),
            narrow=settings.narrow,
        )
        self.folds: dict[tuple[str, Root], Fold] = {
            (site.site, site.root): fold
            for fold in find_folds(self.walk.graph)
            for site in fold.sites
        }

    def _scaling(self, site: str) -> AWQ | SmoothQuant | None:
        found = self.plan.by_site.get(site)
        return None if found is None or found.weights is None else found.scaling  # type: ignore

    @property
    def without_fold(self) -> tuple[str, ...]:
        """The roots of sites whose inputs cannot be scaled: nothing makes them in proportion."""
        return tuple(
            str(marked(step).root)
            for segment in self.walk.segments
            for step in segment.sites
            if (key := (marked(step).site, marked(step).root)) not in self.folds
            and key not in self.unfolded
        )

    def run(self) -> Any:
        """The variables with all factors folded in.

        **Raises:** `PlanError` where sites that read one input would be scaled differently;
        `ValueError` naming the site whose inputs are not finite.
        """
        wanted = {s.site: s.path for s in self.plan.sites if self._scaling(s.site) is not None}
        self.walk.check_reached(wanted)
        count = len(self.walk.segments)
        # A router reads what its experts read, a level before them: they have the say.
        level_of = {
            id(fold): index
            for index, segment in enumerate(self.walk.segments)
            for step in segment.sites
            if (fold := self.folds.get((marked(step).site, marked(step).root))) is not None
        }
        start = time.perf_counter()
        journal = self.journal
        for index, segment, statistics in self.walk.levels(
            lambda index: journal is None or not journal.has_factors(index)
        ):
            passed = time.perf_counter() - start
            groups: dict[int, tuple[Fold | None, list[Step]]] = {}
            for step in segment.sites:
                fold = self.folds.get((marked(step).site, marked(step).root))
                if fold is not None and level_of[id(fold)] != index:
                    continue
                if fold is not None:
                    groups.setdefault(id(fold), (fold, []))[1].append(step)
                elif getattr(self._scaling(marked(step).site), "unfolded", False):
                    groups[id(step)] = (None, [step])
            if journal is not None and journal.has_factors(index):
                held, rows = journal.read_factors(index)
                for (fold, steps), s, row in zip(groups.values(), held, rows, strict=True):
                    self._keep(fold, steps, s)
                    self.rows.append(Scaled(**{**row, "sites": tuple(row["sites"])}))
                start = time.perf_counter()
                continue
            factors = []
            for fold, steps in groups.values():
                began = time.perf_counter()
                s, row = self._choose(index, fold, steps, statistics[id(steps[0])])
                self._keep(fold, steps, s)
                factors.append(s)
                spent = time.perf_counter() - began + passed / len(groups)
                self.rows.append(dataclasses.replace(row, seconds=spent))
                if self.progress is not None:
                    self.progress(self.rows[-1], index + 1, count)
            if journal is not None and factors:
                journal.write_factors(index, factors, self.rows[-len(factors) :])
            start = time.perf_counter()
        return apply_folds(self.walk.variables, self.chosen)

    def _keep(self, fold: Fold | None, steps: list[Step], s: Any) -> None:
        if fold is not None:
            self.chosen.append((fold, np.asarray(s).reshape(fold.shape)))
            return
        (step,) = steps
        free = jnp.asarray(local(s, self.walk.programs.devices))
        self.unfolded[marked(step).site, marked(step).root] = free

    def _choose(
        self, index: int, fold: Fold | None, steps: list[Step], found: Statistics
    ) -> tuple[Any, Scaled]:
        ways = {self._scaling(marked(step).site) for step in steps}
        if len(ways) > 1:
            listed = ", ".join(str(marked(step).root) for step in steps)
            raise PlanError(
                f"{listed} read one input, and it cannot be scaled in {len(ways)} ways. Give their "
                "rules the same scaling."
            )
        (way,) = ways
        assert way is not None
        # Weights that are not quantized take the factors too, but have no say in choosing them.
        weights = [self._matrix(marked(step).root) for step in steps]
        schemes = [self._leaf(marked(step).root).leaf.scheme for step in steps]
        rows = weights
        if fold is not None and len(fold.shape) == 1 and any(w.ndim > 2 for w in weights):
            # Experts that read one input: one factor for all of them.
            found = {**found, **_joined(found)}
            rows = [w.reshape(-1, w.shape[-1]) for w in weights]
        if isinstance(way, AWQ):
            means = mean_magnitude(found["moments"])
            candidates = way.candidates(means, rows, group=schemes[0].tile.contracted)
            candidates = _tied(candidates, fold)
            losses = self._block_losses(index, steps, candidates, weights, schemes)
            if losses is None:
                stack = weights[0].shape[:-2]
                each = jnp.broadcast_to(candidates, (*stack, *candidates.shape[-2:]))
                losses = scaling_losses(each, weights, found["gram"], schemes)
                losses = losses.sum(axis=tuple(range(losses.ndim - candidates.ndim + 1)))
        else:
            candidates = _tied(way.candidates(found["peak"], rows), fold)
            losses = None
            if way.searches:
                losses = self._smoothed(steps, candidates, weights, schemes, found)
        if losses is None:
            scale, plain, least = candidates[..., 0, :], None, None
        else:
            best = choose(candidates, losses)
            scale = best.scale
            plain, least = float(losses[..., 0].sum()), float(losses.min(axis=-1).sum())
        return scale, Scaled(
            scaling=way.name,
            fold=f"inputs of {marked(steps[0]).root}" if fold is None else str(fold),
            sites=tuple(marked(step).site for step in steps),
            plain_loss=plain,
            loss=least,
            seconds=0.0,
        )

    def _leaf(self, root: Root) -> RootPlan:
        return RootPlan(leaf=self.plan.by_path[root.path], root=root)

    def _matrix(self, root: Root) -> Any:
        planned = self._leaf(root)
        w = local(root_array(self.walk.known, root), self.walk.programs.devices)
        return as_matrix(w, **planned.roles).astype(jnp.float32)

    def _smoothed(
        self, steps: list[Step], candidates: Any, weights: Any, schemes: Any, found: Statistics
    ) -> Any:
        """The error of outputs with both sides rounded, on a sample of rows.

        **Raises:** `PlanError` for experts, of which none sees all rows.
        """
        if any(w.ndim > 2 for w in weights):
            raise PlanError(
                f"{marked(steps[0]).site} holds several weights side by side, and which rows meet "
                "which is not known where an alpha is searched for. Give this rule one: "
                "SmoothQuant(alpha=0.5)."
            )
        site = self.plan.by_site[marked(steps[0]).site]
        if site.activations is None:
            raise PlanError(
                f"{site.site} rounds its weights alone, and an alpha is chosen by what rounding "
                "both sides does. Give its rule activations, or one: SmoothQuant(alpha=0.5)."
            )
        x = self.walk.store.get(moving_side(steps[0]), 0)
        use, invars = marked(steps[0]).use, steps[0].eqn.invars
        # Of the weight the shape will do.
        sides = [x if i == 1 - use.side else jnp.zeros(v.aval.shape) for i, v in enumerate(invars)]
        rows = values_of_rows(inputs_of(use, sides))
        rows = rows.reshape(-1, candidates.shape[-1])[:2048].astype(jnp.float32)
        peak = found["peak"] if site.static else None
        return smoothed_losses(
            candidates, weights, rows, schemes, site.activations, static_peak=peak
        )

    def _block_losses(
        self,
        index: int,
        steps: list[Step],
        candidates: Any,
        weights: Sequence[Any],
        schemes: Sequence[Scheme],
    ) -> Any:
        """Mean squared errors of the output of the module that holds the group; `None`: its own."""
        found = inspected(self.walk.segments, index, steps)
        if found is None or candidates.ndim != 2:
            return None
        part, outputs = found
        walk, roots = self.walk, [marked(step).root for step in steps]
        planned = [self._leaf(root) for root in roots]
        plain = walk.fixed(part)
        places = {r: v for v, r in part.graph.roots.items() if r in roots and v in part.inputs}
        batches = walk.like_the_first()[: self.settings.sample]
        moving = [v for v in part.inputs if v in part.graph.moving]

        def outs(values: Mapping[int, Any], number: int) -> list[Any]:
            kept = {v: walk.store.get(v, number) for v in moving}
            made, _ = walk.programs.run(part, {**values, **kept}, narrow=self.settings.narrow)
            return [made[v] for v in outputs]

        wanted = [outs(plain, number) for number in batches]
        losses = []
        for s in candidates:
            values = dict(plain)
            for root, w, scheme, leaf in zip(roots, weights, schemes, planned, strict=True):
                held = _rounded(w, jnp.broadcast_to(s, (*w.shape[:-2], s.size)), scheme)
                values[places[root]] = from_matrix(held, leaf.shape, **leaf.roles).astype(
                    plain[places[root]].dtype
                )
            errors = [_squared(outs(values, n), wanted[n]) for n in batches]
            losses.append(functools.reduce(jnp.add, errors))
        return jnp.stack(losses)


def inspected(
    segments: Sequence[Segment], index: int, steps: Sequence[Step]
) -> tuple[Part, tuple[int, ...]] | None:
    """The part from a group of sites to the output of the module that holds all of them.

    That is what the sites of the next level put out which lie in the same module: for q, k and v
    the output projection, for gate and up the down projection. `None` where there are none, so that
    the outputs of the group itself are all there is to inspect.
    """
    if index + 1 >= len(segments):
        return None
    module = _common([marked(step).root.path for step in steps])
    after = segments[index + 1]
    # Slices of a stack have one path: the next layer's would be there too.
    layer = marked(steps[0]).root.steps
    last = [
        s
        for s in after.sites
        if marked(s).root.path.startswith(f"{module}/") and marked(s).root.steps == layer
    ]
    if not last:
        return None
    graph = after.part.graph
    live = {value for step in last for value in step.reads}
    needed = []
    for step in reversed(after.part.steps):
        if any(v in live for v in step.outputs) and any(v in graph.moving for v in step.reads):
            live.update(step.reads)
            needed.append(step)
    if not all(step in needed for step in steps):
        return None
    outputs = [step.outputs[0] for step in last]
    part = part_of(graph, [*needed[::-1], *last], outputs)
    return part, part.outputs


def _common(paths: Sequence[str]) -> str:
    """The path of the innermost module that holds all of these parameters."""
    split = [path.split("/")[:-1] for path in paths]
    if len(split) == 1:
        return "/".join(split[0])
    shared = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return "/".join(shared)


def _joined(found: Statistics) -> dict[str, Any]:
    """Statistics of the inputs of all entries of a stack together."""
    joined: dict[str, Any] = {}
    if "peak" in found:
        joined["peak"] = found["peak"].max(axis=tuple(range(found["peak"].ndim - 1)))
    if "moments" in found:
        front = tuple(range(found["moments"]["rows"].ndim))
        joined["moments"] = jax.tree.map(lambda x: x.sum(axis=front), found["moments"])
    return joined


def _tied(candidates: Any, fold: Fold | None) -> Any:
    """Candidates that the fold can take: one factor for inputs that have to be scaled alike."""
    if fold is None or fold.channels is None:
        return candidates
    moved = jnp.moveaxis(candidates, -2, 0)
    tied = [tie(np.asarray(s).reshape(fold.shape), fold).reshape(s.shape) for s in moved]
    return jnp.moveaxis(jnp.asarray(np.stack(tied)), 0, -2)


_rounded = jax.jit(rounded_at, static_argnums=2)


@jax.jit
def _squared(outs: list[Any], wanted: list[Any]) -> Any:
    errors = [
        jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)))
        for a, b in zip(outs, wanted, strict=True)
    ]
    return functools.reduce(jnp.add, errors)
