"""Going through a model level by level: every segment run on every batch, statistics added up."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..intercept import Count, Drift, Graph, MarkedSite, PlanError, Root, Step, trace
from ..intercept._inputs import layout_of
from ..intercept._trace import is_array
from ..intercept._variables import parameters, unstamped
from ._compiled import in_segment, Programs, Watch
from ._devices import leaves_of, Round
from ._roots import root_array
from ._segments import cut, marked, moving_side, Segment
from ._store import Store

Statistics = dict[str, Any]
"""What observers saw at a site, by their names; `count` is always among them."""


class Walk:
    """The levels of a model, on some batches, with activations in a store.

    `wanted` says which sites make levels, `observers` what is to be known of the inputs of one,
    and `effective` what a parameter's values are for the equations that read it: this is asked
    anew for each segment. `narrow` is as in `Settings`. With a `twin` the float model runs beside
    it, for observers of both.
    """

    def __init__(
        self,
        model: Any,
        variables: Any,
        batches: Sequence[tuple[Any, ...]],
        store: Store,
        programs: Programs,
        *,
        wanted: Callable[[MarkedSite], bool],
        observers: Callable[[MarkedSite], tuple[Any, ...]],
        effective: Callable[[Root], Any],
        narrow: Any = None,
        twin: bool = False,
    ):
        self.model = model
        self.variables, _ = unstamped(variables)
        self.known = parameters(self.variables)
        devices = programs.devices
        self.batches = (
            [Round(like=batch, leaves=leaves_of(batch)) for batch in batches]
            if devices is None
            else devices.rounds(batches)
        )
        self.store = store
        self.programs = programs
        self.narrow = narrow
        self.twin = twin
        self._wanted = wanted
        self._observers = observers
        self._effective = effective
        self._graphs: dict[Any, tuple[Graph, tuple[Segment, ...]]] = {}
        self._cut = [self._graph(batch.like) for batch in self.batches]

    @property
    def graph(self) -> Graph:
        """The graph of the first batch; those of other shapes have the same values and sites."""
        return self._cut[0][0]

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self._cut[0][1]

    def like_the_first(self) -> list[int]:
        """The numbers of the batches that the first one's segments can be run on."""
        return [n for n, (graph, _) in enumerate(self._cut) if graph is self.graph]

    def _graph(self, batch: tuple[Any, ...]) -> tuple[Graph, tuple[Segment, ...]]:
        key = tuple(
            (x.shape, str(x.dtype)) if is_array(x) else repr(x) for x in jax.tree.leaves(batch)
        )
        if key not in self._graphs:
            graph = trace(self.model, self.variables, *batch)
            if any(_path(known) != _path(graph) for known, _ in self._graphs.values()):
                raise PlanError(
                    f"A batch of {', '.join(map(str, key))} makes the model compute something else "
                    "than the batches before it. Calibrate with batches of one kind."
                )
            self._graphs[key] = (graph, cut(graph, self._wanted))
        return self._graphs[key]

    def check_reached(self, sites: Mapping[str, str]) -> None:
        """Refuses a plan some of whose sites (with their paths) this call does not reach.

        **Raises:** `PlanError` naming the first.
        """
        found = {marked(step).site for step in self.graph.sites}
        reached = {marked(step).site for segment in self.segments for step in segment.sites}
        for site, path in sites.items():
            if site not in reached:
                why = self.graph.unreached.get(path, "this call does not reach it")
                why = "what it reads depends on no data" if site in found else why
                raise PlanError(
                    f"{site} cannot be calibrated: {why}. Give it an algorithm that needs no data, "
                    "or leave it by a rule."
                )

    def levels(
        self, watched: Callable[[int], bool] = lambda index: True
    ) -> Iterator[tuple[int, Segment, dict[int, Statistics]]]:
        """Level by level: its number, its segment, and statistics by the id of a site's step.

        Where `watched` says no, the segment is run without statistics.

        **Raises:** `ValueError` naming the sites whose inputs are not finite.
        """
        for number, (graph, _) in enumerate(self._cut):
            for value, leaf in zip(graph.arguments, self.batches[number].leaves, strict=True):
                self.store.put(value, number, leaf)
                if self.twin:
                    self.store.put(_twin(value), number, leaf)
        for index, segment in enumerate(self.segments):
            groups = self._groups(segment) if watched(index) else []
            yield index, segment, self._pass(index, groups)
        for value in self._left():
            for number in range(len(self.batches)):
                self.store.drop(value, number)
                if self.twin:
                    self.store.drop(_twin(value), number)

    def _left(self) -> list[int]:
        kept = set(self.graph.arguments)
        for segment in self.segments:
            kept |= set(segment.part.outputs)
            kept -= set(segment.done)
        return sorted(kept) if self.segments else list(self.graph.arguments)

    def _groups(self, segment: Segment) -> list[tuple[Watch, list[Step]]]:
        """What to measure, and for which sites: those that read one value in one way share it."""
        groups: dict[Any, tuple[Watch, list[Step]]] = {}
        for step in segment.sites:
            wanted = dict.fromkeys((*self._observers(marked(step)), Count()))
            # Routing may differ between two models, and with it what an expert's rows are.
            pairs = self.twin and marked(step).use.op != "ragged_dot"
            watch = Watch(
                step=step,
                observers=tuple(o for o in wanted if not isinstance(o, Drift)),
                paired=tuple(o for o in wanted if pairs and isinstance(o, Drift)),
            )
            at = layout_of(marked(step).use).groups
            sizes = None if at is None else str(step.inputs[at])
            key = (moving_side(step), sizes, watch.facts)
            groups.setdefault(key, (watch, []))[1].append(step)
        return list(groups.values())

    def _pass(self, index: int, groups: list[tuple[Watch, list[Step]]]) -> dict[int, Statistics]:
        totals: list[Statistics] = []
        observers = tuple((*watch.observers, *watch.paired) for watch, _ in groups)
        # Constants may differ from shape to shape of the batches.
        held: dict[int, tuple[dict[int, Any], dict[int, Any]]] = {}
        for number, (graph, segments) in enumerate(self._cut):
            segment = segments[index]
            if id(segment) not in held:
                plain = self.fixed(segment.part, self._plain) if self.twin else {}
                held[id(segment)] = self.fixed(segment.part), plain
            fixed, floats = held[id(segment)]
            watches = [in_segment(watch, segment) for watch, _ in groups]
            made = {v for step in segment.part.steps for v in step.outputs}
            read = [*segment.part.inputs, *(v for w in watches for v in w.step.reads)]
            values = dict(fixed)
            values |= {
                v: self.store.get(v, number) for v in read if v in graph.moving and v not in made
            }
            outs, stats = self.programs.run(segment.part, values, watches, narrow=self.narrow)
            if self.twin:
                self._run_twin(segment, number, watches, floats, (values, outs), stats)
            for value, array in outs.items():
                self.store.put(value, number, array)
            for value in segment.done:
                self.store.drop(value, number)
            for each in self._apart(stats, number):
                totals = _merged(observers, totals, each) if totals else each
        for (_, steps), stats in zip(groups, totals, strict=True):
            _check_finite(steps, stats)
        return {
            id(step): stats
            for (_, steps), stats in zip(groups, totals, strict=True)
            for step in steps
        }

    def _run_twin(
        self,
        segment: Segment,
        number: int,
        watches: list[Watch],
        floats: dict[int, Any],
        quantized: tuple[dict[int, Any], dict[int, Any]],
        statistics: list[Statistics],
    ) -> None:
        """The segment in the float model, and statistics of both."""
        part, moving = segment.part, segment.part.graph.moving
        kept = {v: self.store.get(_twin(v), number) for v in part.inputs if v in moving}
        outs, _ = self.programs.run(part, {**floats, **kept}, narrow=self.narrow)
        for watch, found in zip(watches, statistics, strict=True):
            if watch.paired:
                value = moving_side(watch.step)
                values, made = quantized
                x = made[value] if value in made else values[value]
                y = outs[value] if value in outs else self.store.get(_twin(value), number)
                found.update(self.programs.run_paired(watch, x, y))
        for value, array in outs.items():
            self.store.put(_twin(value), number, array)
        for value in segment.done:
            self.store.drop(_twin(value), number)

    def _plain(self, root: Root) -> Any:
        return root_array(self.known, root)

    def _apart(self, stats: list[Statistics], number: int) -> list[list[Statistics]]:
        devices = self.programs.devices
        return [stats] if devices is None else devices.apart(stats, self.batches[number].count)

    def fixed(self, part: Any, effective: Callable[[Root], Any] | None = None) -> dict[int, Any]:
        """Parameters, other variables and constants that a part reads, as arrays."""
        effective = effective or self._effective
        leaves = jax.tree.leaves(self.variables)
        fixed = {}
        for value in part.inputs:
            if value in part.graph.roots:
                fixed[value] = effective(part.graph.roots[value])
            elif value in part.graph.constants:
                fixed[value] = jnp.asarray(part.graph.constants[value])
            elif value in part.graph.variables:
                leaf: Any = leaves[part.graph.variables[value]]
                # It may be one that is read when it is asked for.
                loaded = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
                fixed[value] = jnp.asarray(loaded)
        devices = self.programs.devices
        return fixed if devices is None else {v: devices.everywhere(x) for v, x in fixed.items()}


def _path(graph: Graph) -> list[Any]:
    """What a graph computes, whatever the shapes: its equations, and the values they make."""
    return [(step.name, step.outputs) for step in graph.steps]


def _twin(value: int) -> int:
    """Where the store has a value of the float model."""
    return -1 - value


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _merged(observers: tuple[tuple[Any, ...], ...], a: Any, b: Any) -> Any:
    return [
        {o.name: o.merge(x[o.name], y[o.name]) for o in own}
        for own, x, y in zip(observers, a, b, strict=True)
    ]


def _check_finite(steps: list[Step], statistics: Statistics) -> None:
    bad = int(np.asarray(statistics["count"]["nonfinite"]).sum())
    if bad:
        names = ", ".join(str(marked(step).root) for step in steps)
        raise ValueError(
            f"{bad} rows of the inputs of {names} hold NaN or infinity on the calibration data. "
            "The model overflows before this site, a parameter there is damaged, or what was given "
            "is nothing the model takes, such as ids beyond the vocabulary."
        )
