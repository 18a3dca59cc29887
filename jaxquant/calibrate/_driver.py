"""Choosing codes level by level, each linear evaluated once, on what quantized levels put out."""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..algorithms import (
    as_matrix,
    assemble,
    from_matrix,
    held_values,
    known_outliers,
    nearest,
    static_observers,
    static_scale,
)
from ..algorithms._nearest import not_finite
from ..intercept import Drift, MarkedSite, Peak, Plan, PlanError, Root, SitePlan, Step
from ..intercept._accumulate import ungrouped
from ..ops import OutlierWeights
from ..qarray import dequantize, QArray
from ._compiled import Programs
from ._devices import Devices, local
from ._journal import Journal
from ._results import ALWAYS, Results
from ._roots import replaced, root_array, RootPlan
from ._segments import marked, Segment
from ._settings import Inputs, Settings
from ._store import Store
from ._walk import Statistics, Walk


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedSite:
    """What calibration did at one site, for one slice of a stacked parameter.

    `nearest_error` and `error` are relative errors of the site's output on the calibration data,
    `|x (W' - W)|^2 / |x W|^2`, of rounding to nearest and of the codes that were chosen; `None`
    where no Gram matrix was taken. `rows` counts the vectors that met the weight. `notes` say what
    did not go as usual.
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


State = dict[str, Any]
"""Arrays that belong to a site rather than to its weight, by name: see `intercept._states`."""


class Quantization:
    """The results of the levels so far: codes by root, and state by site and root."""

    def __init__(
        self,
        plan: Plan,
        known: Mapping[str, Any],
        settings: Settings,
        journal: Journal | None,
        progress: Callable[[CalibratedSite, int, int], None] | None,
        devices: Devices | None = None,
    ):
        self.plan = plan
        self.known = known
        self.settings = settings
        self.journal = journal
        self.progress = progress
        self.devices = devices
        self.results = Results(plan, journal)
        self.states: dict[str, dict[Root, State]] = {}
        self.rows: list[CalibratedSite] = []

    def run(
        self, model: Any, variables: Any, batches: Sequence[tuple[Any, ...]], store: Store
    ) -> Programs:
        """Goes through all levels; returns what was compiled.

        **Raises:** `PlanError` if a site that needs data is not in the graph; `ValueError` naming
        the site whose inputs are not finite.
        """
        walk = Walk(
            model,
            variables,
            batches,
            store,
            Programs(self.devices),
            wanted=self.wanted,
            observers=self.observers,
            effective=self.effective,
            narrow=self.settings.narrow,
            twin=self._needs_twin(),
        )
        walk.check_reached({s.site: s.path for s in self.plan.sites if needs_data(s)})
        _check_read_once(walk.segments)
        count = len(walk.segments)

        def done(index: int) -> bool:
            return self.journal is not None and self.journal.has(index)

        start = time.perf_counter()
        for index, segment, statistics in walk.levels(lambda index: not done(index)):
            if done(index):
                self._read(index, segment)
            else:
                self._level(index, count, segment, statistics, time.perf_counter() - start)
            self.results.finish(index)
            start = time.perf_counter()
        return walk.programs

    def smooth(self, factors: Mapping[tuple[str, Root], Any]) -> None:
        """Sites whose inputs are divided at run time: weights times the factors, rounded.

        **Raises:** `PlanError` for a site at which data decide something else, too.
        """
        for (name, root), s in factors.items():
            site = self.plan.by_site[name]
            if needs_data(site) or site.algorithm is not None:
                raise PlanError(
                    f"Nothing takes the factors of {name}, and inputs that are divided at run time "
                    "go with no algorithm and no static activations. Leave out `unfolded`, or "
                    "these."
                )
            if root in self.results:
                others = ", ".join(site for site, own in self.states.items() if root in own)
                raise PlanError(
                    f"{root} is read by {others} and {name}, which would divide their inputs by "
                    "factors of their own, and its codes stand for one product. Leave out "
                    "`unfolded` for it."
                )
            planned = RootPlan(leaf=self.plan.by_path[root.path], root=root)
            roles = planned.roles
            w = local(root_array(self.known, root), self.devices)
            matrix = as_matrix(w, **roles).astype(jnp.float32) * s[..., None, :]
            scaled = from_matrix(matrix, planned.shape, **roles).astype(w.dtype)
            self.results.put(ALWAYS, {root: nearest(scaled, planned.leaf.scheme, **roles)})
            self.states.setdefault(name, {})[root] = {"smoothing": s}

    def _needs_twin(self) -> bool:
        """Whether an algorithm wants to know how inputs depart from those of the float model."""
        if self.settings.inputs is Inputs.FLOAT:
            return False
        algorithms = (site.algorithm for site in self.plan.sites)
        return any(isinstance(o, Drift) for a in algorithms if a is not None for o in a.observers)

    def wanted(self, mark: MarkedSite) -> bool:
        site = self.plan.by_site.get(mark.site)
        return site is not None and needs_data(site)

    def observers(self, mark: MarkedSite) -> tuple[Any, ...]:
        site = self.plan.by_site[mark.site]
        observers = () if site.algorithm is None else tuple(site.algorithm.observers)
        if site.static and site.activations is not None:
            observers += static_observers(site.activations)
        return observers + ((Peak(),) if keeps_outliers(site) else ())

    def _level(
        self,
        index: int,
        count: int,
        segment: Segment,
        statistics: Mapping[int, Statistics],
        passed: float,
    ) -> None:
        rows: list[CalibratedSite] = []
        written: dict[Root, QArray] = {}
        states: list[tuple[str, Root, State]] = []
        for step in segment.sites:
            site, root = marked(step).site, marked(step).root
            began = time.perf_counter()
            found = statistics[id(step)]
            planned = RootPlan(leaf=self.plan.by_path[root.path], root=root)
            w = local(root_array(self.known, root), self.devices)
            state = self._state(self.plan.by_site[site], planned, w, found)
            if root not in self.results and root not in written:
                q, more, row = self._choose(step, planned, w, found)
                if more:
                    _check_reordered(self.plan.by_site[site], state)
                state |= more
                written[root] = q
                seconds = time.perf_counter() - began + passed / len(segment.sites)
                rows.append(dataclasses.replace(row, seconds=seconds))
                if self.progress is not None:
                    self.progress(rows[-1], index + 1, count)
            if state:
                self.states.setdefault(site, {})[root] = state
                states.append((site, root, state))
        self.rows += rows
        self.results.put(index, written)
        if self.journal is not None:
            named = {str(root): q for root, q in written.items()}
            self.journal.write(index, named, rows, states)

    def _choose(
        self, step: Step, planned: RootPlan, w: Any, statistics: Statistics
    ) -> tuple[QArray, State, CalibratedSite]:
        """The codes of a site's root, what goes with them, and what there is to tell."""
        site, root = self.plan.by_site[marked(step).site], planned.root
        roles = planned.roles
        algorithm: Any = site.algorithm
        scheme, notes = planned.leaf.scheme, ()
        plain = nearest(w, scheme, **roles)
        q, state = plain, {}
        rows = np.asarray(statistics["count"]["rows"])
        matrix = as_matrix(w, **roles).astype(jnp.float32)
        if not bool(jnp.isfinite(matrix).all()):
            raise not_finite(str(root))
        if self.devices is not None:
            matrix = self.devices.by_rows(matrix)
        if algorithm is not None:
            try:
                chosen = algorithm.run(matrix, statistics, scheme)
            except ValueError as error:
                raise ValueError(f"{root} by {site.rule!r}: {error}") from error
            chosen = local(chosen, self.devices)
            notes = tuple(chosen.notes)
            if chosen.permutation is not None:
                state = {"permutation": chosen.permutation}
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
            few = rows < max(1.0, self.settings.least_share * float(rows.mean()))
            if few.any():
                q = replaced(q, plain, few, planned.stack)
                said = ", ".join(str(i) for i in np.flatnonzero(few)) if few.ndim else "all"
                notes += (f"entries {said} of the stack saw too few rows: rounded to nearest",)
                if state:
                    state = {"permutation": _unpermuted(chosen.permutation, few)}
        errors: list[float | None] = [None, None]
        if (gram := statistics.get("gram")) is not None:
            rounded = as_matrix(dequantize(plain, jnp.float32), **roles)
            held = (rounded, held_values(q, state, **roles))
            errors = [float(x) for x in _output_errors(matrix, held, gram)]
        least, k = int(rows.min()), matrix.shape[-1]
        if algorithm is not None and "gram" in statistics and least < k:
            notes += (
                f"{least} rows for {k} inputs: codes fit these rows, and others less well; give "
                "more data",
            )
        row = CalibratedSite(
            site=site.site,
            root=str(root),
            block=block_of(root),
            algorithm="nearest" if algorithm is None else algorithm.name,
            rows=int(rows.sum()),
            nearest_error=errors[0],
            error=errors[1],
            seconds=0.0,
            notes=notes,
        )
        return q, state, row

    def _state(self, site: SitePlan, planned: RootPlan, w: Any, statistics: Statistics) -> State:
        """What is fixed at a site beside its codes: ranges of inputs, columns of outliers."""
        roles = planned.roles
        state: State = {}
        if site.static and site.activations is not None:
            *stack, _, k = as_matrix(w, **roles).shape
            lead = np.ndim(statistics["count"]["rows"])
            seen = ungrouped(
                static_observers(site.activations), statistics, stack=len(stack), lead=lead
            )
            state |= static_scale(site.activations, seen, stack=tuple(stack), k=k)
        if keeps_outliers(site):
            assert site.outliers is not None
            matrix = as_matrix(w, **roles)
            state |= known_outliers(matrix, statistics["peak"], site.outliers)
        return local(state, self.devices)

    def effective(self, root: Root) -> Any:
        """A root as equations see it: what its codes stand for, once they are chosen."""
        if self.settings.inputs is Inputs.FLOAT or root.path not in self.plan.by_path:
            return root_array(self.known, root)
        planned = RootPlan(leaf=self.plan.by_path[root.path], root=root)
        roles = planned.roles
        if root in self.results:
            q = self.results[root]
            held = (own[root] for own in self.states.values() if root in own)
            state = {name: x for each in held for name, x in each.items()}
            if not {"permutation", "smoothing"} & set(state):
                return dequantize(q)
            matrix = held_values(q, state, **roles)
            return from_matrix(matrix, planned.shape, **roles).astype(q.dtype)
        sites = [site for site in self.plan.sites if site.path == root.path]
        w = root_array(self.known, root)
        if any(map(needs_data, sites)) or any(s.algorithm is not None for s in sites):
            # Read before its own site is reached, or held by codes that are made apart.
            return w
        return dequantize(nearest(w, planned.leaf.scheme, **roles))

    def _read(self, index: int, segment: Segment) -> None:
        roots = [r for r in {marked(s).root for s in segment.sites} if r not in self.results]
        held, rows, states = self.results.read(index, roots)
        self.results.put(index, held)
        for site, root, state in states:
            self.states.setdefault(site, {})[root] = jax.tree.map(jnp.asarray, state)
        self.rows += [CalibratedSite(**{**row, "notes": tuple(row["notes"])}) for row in rows]


def _check_read_once(segments: Sequence[Segment]) -> None:
    """Refuses one weight that the steps of a loop read in turn, at one site.

    **Raises:** `PlanError` naming it.
    """
    seen: set[tuple[str, Root]] = set()
    for segment in segments:
        for step in segment.sites:
            key = marked(step).site, marked(step).root
            if key in seen:
                raise PlanError(
                    f"{key[0]} cannot be calibrated: the steps of a loop share the weight, and "
                    "each has inputs of its own. Give it an algorithm that needs no data, or leave "
                    "it by a rule."
                )
            seen.add(key)


def keeps_outliers(site: SitePlan) -> bool:
    """Whether the weights that meet outliers are kept as they are."""
    return site.outliers is not None and site.outliers.weights is OutlierWeights.ORIGINAL


def needs_data(site: SitePlan) -> bool:
    """Whether something at a site is chosen from what it multiplies with, scalings apart."""
    informed = site.algorithm is not None and len(site.algorithm.observers) > 0
    return site.weights is not None and (informed or site.static or keeps_outliers(site))


def block_of(root: Root) -> str:
    """What a table calls the block of a root: its path up to a number, or else its first part."""
    parts = root.path.split("/")
    end = next((i for i, part in enumerate(parts) if re.search(r"\d+$", part)), 0)
    name = "/".join(parts[: end + 1])
    return name + (f"[{','.join(str(i) for _, i in root.steps)}]" if root.steps else "")


def _check_reordered(site: SitePlan, state: State) -> None:
    """Refuses codes of permuted inputs at a site that cannot permute, or not all that it holds.

    **Raises:** `PlanError` naming the site.
    """
    if site.op != "dot":
        raise PlanError(
            f"{site.site} is no dot, and only dots take their inputs in another order. Give its "
            "rule Order.STATIC."
        )
    tiled = "scale" in state and np.shape(state["scale"])[-1:] not in ((), (1,))
    if state.keys() - {"scale", "zero_point"} or tiled:
        raise PlanError(
            f"{site.site} takes its inputs in another order, and has original outlier weights or "
            "static scales of tiles, which are in the model's. Give its rule Order.STATIC, or "
            "leave them out."
        )


def _unpermuted(permutation: Any, few: np.ndarray) -> Any:
    plain = jnp.broadcast_to(jnp.arange(permutation.shape[-1]), permutation.shape)
    return jnp.where(jnp.asarray(few)[..., None], plain.astype(permutation.dtype), permutation)


@jax.jit
def _output_errors(w: Any, held: tuple[Any, ...], gram: Any) -> list[Any]:
    def size(x: Any) -> Any:
        return jnp.einsum("...nk,...kl,...nl->", x, gram, x)

    whole = jnp.maximum(size(w), jnp.finfo(jnp.float32).tiny)
    return [size(each - w) / whole for each in held]
