"""Sequential calibration: level by level, each linear evaluated once, on quantized inputs."""

import dataclasses
import enum
import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..algorithms import as_matrix, assemble, nearest
from ..intercept import Count, Graph, Plan, PlanError, Root, SitePlan, Step, trace
from ..intercept._variables import parameters, unstamped
from ..qarray import abstract_qarray, dequantize, QArray
from ._compiled import in_segment, Programs, Watch
from ._journal import Journal
from ._roots import replaced, root_array, RootPlan
from ._segments import cut, marked, moving_side, Segment
from ._store import Store


class Inputs(enum.Enum):
    """What sites see while those after them are calibrated.

    `QUANTIZED`: what the weights that are chosen already make of the data, as GPTQ does; later
    layers make up for the errors of earlier ones. `FLOAT`: what the float model makes of it.
    """

    QUANTIZED = "quantized"
    FLOAT = "float"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a calibration runs; none of these says what is done to a site.

    `memory` bounds the bytes of activations held in memory; more of them go to files. `narrow` is
    a dtype in which sites multiply while calibrating, with sums in float32 (`None`: as the model
    does). Experts that saw fewer rows than `least_share` of what an expert saw on average are
    rounded to nearest.
    """

    inputs: Inputs = Inputs.QUANTIZED
    memory: int = 4 << 30
    narrow: Any = None
    least_share: float = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedSite:
    """What calibration did at one site, for one slice of a stacked parameter.

    `nearest_error` and `error` are relative errors of the site's output on the calibration data,
    `|x (W' - W)|^2 / |x W|^2`, of rounding to nearest and of the codes that were chosen; `None`
    where no Gram matrix was taken. `notes` say what did not go as usual.
    """

    site: str
    root: str
    block: str
    algorithm: str
    rows: int
    nearest_error: float | None
    error: float | None
    seconds: float
    notes: tuple[str, ...] = ()


class Calibration:
    """One run: the levels of a graph in order, their results in memory or in a journal."""

    def __init__(
        self,
        model: Any,
        variables: Any,
        batches: Sequence[tuple[Any, ...]],
        plan: Plan,
        *,
        settings: Settings,
        journal: Journal | None,
        progress: Callable[[CalibratedSite, int, int], None] | None,
    ):
        self.variables, _ = unstamped(variables)
        self.known = parameters(self.variables)
        self.plan = plan
        self.batches = batches
        self.settings = settings
        self.journal = journal
        self.progress = progress
        self.programs = Programs()
        self.results: dict[Root, QArray] = {}
        self.rows: list[CalibratedSite] = []
        self._graphs: dict[Any, tuple[Graph, tuple[Segment, ...]]] = {}
        self.model = model

    def graph(self, batch: tuple[Any, ...]) -> tuple[Graph, tuple[Segment, ...]]:
        """The graph of a batch and its segments; batches of one shape share them."""
        key = tuple((jnp.shape(x), str(jnp.result_type(x))) for x in jax.tree.leaves(batch))
        if key not in self._graphs:
            graph = trace(self.model, self.variables, *batch)
            self._graphs[key] = (graph, cut(graph, self._wanted))
        return self._graphs[key]

    def _wanted(self, mark: Any) -> bool:
        site = self.plan.by_site.get(mark.site)
        return site is not None and needs_data(site)

    def run(self, store: Store) -> None:
        """Goes through all levels.

        **Raises:** `PlanError` if a site that needs data is not in the graph; `ValueError` naming
        the site whose inputs are not finite.
        """
        graphs = [self.graph(batch) for batch in self.batches]
        first, segments = graphs[0]
        self._check_reached(first)
        for number, (graph, _) in enumerate(graphs):
            for value, leaf in zip(graph.arguments, _arrays(self.batches[number]), strict=True):
                store.put(value, number, leaf)
        for index in range(len(segments)):
            self._level(index, [own[index] for _, own in graphs], store, len(segments))

    def _check_reached(self, graph: Graph) -> None:
        reached = {marked(step).site for step in graph.sites}
        for site in self.plan.sites:
            if needs_data(site) and site.site not in reached:
                why = graph.unreached.get(site.path, "this call does not reach it")
                raise PlanError(
                    f"{site.site} cannot be calibrated: {why}. Give it an algorithm that needs no "
                    "data, or leave it by a rule."
                )

    def _level(self, index: int, segments: list[Segment], store: Store, count: int) -> None:
        start = time.perf_counter()
        segment = segments[0]
        finished = self.journal is not None and self.journal.has(index)
        groups = [] if finished else self._groups(segment)
        statistics = self._pass(segments, groups, store)
        if finished:
            self._read(index, segment)
            return
        passed, rows = time.perf_counter() - start, []
        written: dict[str, QArray] = {}
        for step in segment.sites:
            root = marked(step).root
            if root in self.results:
                continue
            began = time.perf_counter()
            q, row = self._choose(step, statistics[id(step)])
            seconds = time.perf_counter() - began + passed / len(segment.sites)
            row = dataclasses.replace(row, seconds=seconds)
            self.results[root] = q
            written[str(root)] = q
            rows.append(row)
            if self.progress is not None:
                self.progress(row, index + 1, count)
        self.rows += rows
        if self.journal is not None:
            self.journal.write(index, written, rows)

    def _groups(self, segment: Segment) -> list[tuple[Watch, list[Step]]]:
        """What to measure, and for which sites: those that read one value in one way share it."""
        groups: dict[Any, tuple[Watch, list[Step]]] = {}
        for step in segment.sites:
            observers = self.plan.by_site[marked(step).site].algorithm.observers  # type: ignore
            watch = Watch(step=step, observers=tuple(dict.fromkeys((*observers, Count()))))
            key = (moving_side(step), watch.facts)
            groups.setdefault(key, (watch, []))[1].append(step)
        return list(groups.values())

    def _pass(
        self, segments: list[Segment], groups: list[tuple[Watch, list[Step]]], store: Store
    ) -> dict[int, dict[str, Any]]:
        """Evaluates a segment on every batch, and adds up statistics: by the id of a site's step.

        `segments` has one for each batch: the same, in the graph of its shape.
        """
        totals: list[dict[str, Any]] = []
        fixed = self._fixed(segments[0])
        for number, segment in enumerate(segments):
            part, moving = segment.part, segment.part.graph.moving
            made = {v for step in part.steps for v in step.outputs}
            watches = [in_segment(watch, segment) for watch, _ in groups]
            wanted = [*part.inputs, *(v for watch in watches for v in watch.step.reads)]
            values = dict(fixed)
            values |= {v: store.get(v, number) for v in wanted if v in moving and v not in made}
            outs, stats = self.programs.run(part, values, watches, narrow=self.settings.narrow)
            for value, array in outs.items():
                store.put(value, number, array)
            for value in segment.done:
                store.drop(value, number)
            totals = (
                _merged(tuple(w.observers for w, _ in groups), totals, stats) if totals else stats
            )
        for (_, steps), stats in zip(groups, totals, strict=True):
            _check_finite(steps, stats)
        return {
            id(s): stats for (_, steps), stats in zip(groups, totals, strict=True) for s in steps
        }

    def _fixed(self, segment: Segment) -> dict[int, Any]:
        """Parameters, other variables and constants that a segment reads, as arrays."""
        graph = segment.part.graph
        leaves = jax.tree.leaves(self.variables)
        fixed = {}
        for value in segment.part.inputs:
            if value in graph.roots:
                fixed[value] = self._effective(graph.roots[value])
            elif value in graph.constants:
                fixed[value] = jnp.asarray(graph.constants[value])
            elif value in graph.variables:
                fixed[value] = leaves[graph.variables[value]]
        return fixed

    def _effective(self, root: Root) -> Any:
        """A root as sites see it: what its codes stand for, once they are chosen."""
        if self.settings.inputs is Inputs.FLOAT or root.path not in self.plan.by_path:
            return root_array(self.known, root)
        if root in self.results:
            return dequantize(self.results[root])
        planned = RootPlan(leaf=self.plan.by_path[root.path], root=root)
        if any(needs_data(s) for s in self.plan.sites if s.path == root.path):
            # Read before its own site is reached, by another operation.
            return root_array(self.known, root)
        q = nearest(
            root_array(self.known, root),
            planned.leaf.scheme,
            contracted=planned.contracted,
            stack=planned.stack,
        )
        return dequantize(q)

    def _choose(self, step: Step, statistics: Mapping[str, Any]) -> tuple[QArray, CalibratedSite]:
        """The codes of a site's root, and what there is to tell of them."""
        mark = marked(step)
        site = self.plan.by_site[mark.site]
        planned = RootPlan(leaf=self.plan.by_path[mark.root.path], root=mark.root)
        w = root_array(self.known, mark.root)
        roles: dict[str, Any] = {"contracted": planned.contracted, "stack": planned.stack}
        matrix = as_matrix(w, **roles).astype(jnp.float32)
        algorithm: Any = site.algorithm
        scheme = planned.leaf.scheme
        chosen = algorithm.run(matrix, statistics, scheme)
        q = assemble(
            chosen.codes,
            chosen.scale,
            chosen.zero_point,
            offset=chosen.offset,
            shape=tuple(w.shape),
            dtype=w.dtype,
            scheme=scheme,
            **roles,
        )
        plain = nearest(w, scheme, **roles)
        rows, notes = np.asarray(statistics["count"]["rows"]), tuple(chosen.notes)
        few = rows < max(1.0, self.settings.least_share * float(rows.mean()))
        if few.any():
            q = replaced(q, plain, few, planned.stack)
            said = ", ".join(str(i) for i in np.flatnonzero(few)) if few.ndim else "all"
            notes += (f"entries {said} of the stack saw too few rows: rounded to nearest",)
        errors: list[float | None] = [None, None]
        if (gram := statistics.get("gram")) is not None:
            held = [plain, q]
            errors = [float(_output_error(matrix, _matrix_of(x, **roles), gram)) for x in held]
        row = CalibratedSite(
            site=site.site,
            root=str(mark.root),
            block=block_of(mark.root),
            algorithm=algorithm.name,
            rows=int(rows.sum()),
            nearest_error=errors[0],
            error=errors[1],
            seconds=0.0,
            notes=notes,
        )
        return q, row

    def _read(self, index: int, segment: Segment) -> None:
        assert self.journal is not None
        roots = {marked(step).root for step in segment.sites} - set(self.results)
        structs = {}
        for root in roots:
            planned = RootPlan(leaf=self.plan.by_path[root.path], root=root)
            structs[str(root)] = abstract_qarray(
                planned.shape,
                np.dtype(planned.leaf.dtype),
                planned.leaf.scheme,
                contracted=planned.contracted,
                stack=planned.stack,
            )
        held = self.journal.read(index, structs)
        self.results |= {root: jax.tree.map(jnp.asarray, held[str(root)]) for root in roots}
        self.rows += [
            CalibratedSite(**{**row, "notes": tuple(row["notes"])})
            for row in self.journal.rows(index)
        ]


def needs_data(site: SitePlan) -> bool:
    """Whether a site's codes are chosen from what it multiplies with."""
    return site.weights is not None and bool(getattr(site.algorithm, "observers", ()))


def block_of(root: Root) -> str:
    """What a table calls the block of a root: its path up to a number, or else its first part."""
    parts = root.path.split("/")
    end = next((i for i, part in enumerate(parts) if re.search(r"\d+$", part)), 0)
    name = "/".join(parts[: end + 1])
    return name + (f"[{','.join(str(i) for _, i in root.steps)}]" if root.steps else "")


def _arrays(batch: tuple[Any, ...]) -> list[Any]:
    return [jnp.asarray(x) for x in jax.tree.leaves(batch)]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _merged(observers: tuple[tuple[Any, ...], ...], a: Any, b: Any) -> Any:
    return [
        {o.name: o.merge(x[o.name], y[o.name]) for o in own}
        for own, x, y in zip(observers, a, b, strict=True)
    ]


def _matrix_of(q: QArray, **roles: Any) -> Any:
    return as_matrix(dequantize(q, jnp.float32), **roles)


@jax.jit
def _output_error(w: Any, held: Any, gram: Any) -> Any:
    def size(x: Any) -> Any:
        return jnp.einsum("...nk,...kl,...nl->", x, gram, x)

    return size(held - w) / jnp.maximum(size(w), jnp.finfo(jnp.float32).tiny)


def _check_finite(steps: list[Step], statistics: Mapping[str, Any]) -> None:
    bad = int(np.asarray(statistics["count"]["nonfinite"]).sum())
    if bad:
        names = ", ".join(str(marked(step).root) for step in steps)
        raise ValueError(
            f"{bad} rows of the inputs of {names} hold NaN or infinity on the calibration data. "
            "The model overflows before this site, or a parameter there is damaged."
        )
