"""What is done at a site: list it (plan), compute on codes (infer), or watch it (observe)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend import source_info_util

from ..ops import preferred_backend
from ..qarray import QArray
from ..training import straight_through
from ._adapters import adapted, ADAPTER
from ._choices import Choices
from ._compute import compute
from ._conditioned import Met
from ._evaluate import Use
from ._inputs import measure, observed
from ._joined import plain, Sliced
from ._placed import weight_sharding
from ._plan import Plan, PlanError, SitePlan
from ._products import bind_plain, infer_product, PRODUCT, Product
from ._states import check_readable, RANGES, state_at
from ._weight import is_weight, Weight


class ListSites:
    """Mode *plan*: computes as the float model does, and notes every use of every parameter."""

    tracks_constants = True
    collects = False
    flattens = False
    trains = False
    reads_stacks = False

    def __init__(self, *, products: bool = False) -> None:
        self.products = products
        self.uses: dict[str, Use] = {}
        self.others: dict[str, set[str]] = {}
        self.met: dict[str, Product] = {}

    def compute(self, uses: Sequence[Use], operands: Sequence[Any], eqn: Any) -> tuple[Any, Any]:
        for use in uses:
            self.uses.setdefault(use.site, use)
        return bind_plain(eqn, operands), {}

    def product(self, site: str, path: str, operands: Sequence[Any], eqn: Any) -> Any:
        out = eqn.outvars[0].aval
        self.met.setdefault(site, Product(site=site, path=path, shape=out.shape, dtype=out.dtype))
        return bind_plain(eqn, operands)

    def leave(self, weight: Weight, eqn: Any, reason: str | None) -> Any:
        self.others.setdefault(weight.path, set()).add(reason or eqn.primitive.name)
        return plain(weight)

    def merge(self, site: str, a: Any, b: Any) -> Any:
        return a

    def empty(self, site: str, struct: Any) -> Any:
        return struct

    def reduce(self, site: str, value: Any) -> Any:
        return value

    def for_derivatives(self) -> "ListSites":
        return ListSites()


NO_GRADIENT = (
    "This recipe quantizes activations ({}), and in mode infer rounding has no useful gradient. "
    "Differentiate in mode simulate (quantization-aware training), or use a weight-only recipe."
)


class Infer:
    """Mode *infer*: sites compute on codes, activations are rounded where the plan says so.

    In derivative rules (`rounding=False`) there is no rounding: a rule under which activations are
    quantized is refused there.
    """

    tracks_constants = False
    collects = False
    flattens = False
    trains = False

    def __init__(
        self,
        plan: Plan,
        *,
        backend: str | None = None,
        rounding: bool = True,
        choices: Choices | None = None,
    ):
        self.plan = plan
        self.choices = choices
        self.reads_stacks = (backend or preferred_backend()) == "mosaic_tpu"
        self.backend = backend
        self.rounding = rounding
        self.products = rounding and any(site.op == PRODUCT for site in plan.sites)

    def site_plan(self, use: Use) -> SitePlan | None:
        """The plan of a site; one that only this call reaches does as its siblings do.

        Derivative rules have no sites of their own: `None` where nothing is known.
        """
        siblings = [s for s in self.plan.sites if s.path == use.path and s.op == use.op]
        if not self.rounding:
            for site in siblings:
                if site.activations is not None:
                    raise TypeError(NO_GRADIENT.format(site.activations))
            return siblings[0] if siblings else None
        found = self.plan.by_site.get(use.site)
        if found is not None:
            return found
        if siblings and all(s.activations == siblings[0].activations for s in siblings):
            return siblings[0]
        raise PlanError(
            f"This call uses {use.site}, which is not in the plan, and its other uses do not tell "
            "what to do here. Make the plan with the call you want to run."
        )

    def met(self, uses: Sequence[Use]) -> dict[int, Met]:
        """The plans of the sides that are quantized weights, with their state."""
        found = {use.side: self.site_plan(use) for use in uses}
        plans = {
            use.side: self._met(use, plan)
            for use in uses
            if (plan := found[use.side]) is not None and plan.weights is not None
        }
        for use in uses:
            if use.side not in plans:
                check_readable(use.weight, f"read by {use.site}")
        return plans

    def compute(self, uses: Sequence[Use], operands: Sequence[Any], eqn: Any) -> tuple[Any, Any]:
        plans = self.met(uses)
        computable = [
            x.value if is_weight(x) and side in plans else x if isinstance(x, Sliced) else plain(x)
            for side, x in enumerate(operands)
        ]
        if not any(isinstance(x, QArray) for x in computable):
            return bind_plain(eqn, computable), {}
        y = self._computed(eqn, computable, plans)
        return self.adapted(y, uses, operands, plans, eqn), {}

    def _computed(self, eqn: Any, held: list[Any], plans: Mapping[int, Met]) -> Any:
        """The product of a site. Where an adapter is trained, gradients go through it to what comes
        before, and of the frozen weight its codes are kept for them, and not what these stand for.
        """
        if not all(_keeps_codes(met) for met in plans.values()) or any(
            isinstance(x, Sliced) for x in held
        ):
            return compute(eqn, held, plans, self.backend)
        settings = {side: met.without_state() for side, met in plans.items()}
        return straight_through(
            lambda held: compute(eqn, list(held), settings, self.backend),
            lambda *values: eqn.primitive.bind(*values, **eqn.params),
            [None if isinstance(x, QArray) else x for x in held],
            held,
        )

    def adapted(
        self,
        y: Any,
        uses: Sequence[Use],
        operands: Sequence[Any],
        plans: Mapping[int, Met],
        eqn: Any,
    ) -> Any:
        """The result of a site with what adapters beside its weights add."""
        for use in uses:
            if use.op == "dot" and use.side in plans:
                x = operands[1 - use.side]
                y = adapted(y, x, use.weight, use.side, plans[use.side], eqn)
        return y

    def _met(self, use: Use, plan: SitePlan) -> Met:
        """The plan of a site with its state there."""
        if not self.rounding:
            check_readable(use.weight, "differentiated through")
            return Met(plan=plan)
        if use.op not in ("dot", "conv"):
            check_readable(use.weight, f"read by {use.site}")
            return Met(plan=plan)
        # Of a convolution one scale holds for all that is convolved: no axis of it has its own.
        contracted, batch = (
            (axes[use.side] for axes in use.eqn.params["dimension_numbers"])
            if use.op == "dot"
            else ((), ())
        )
        state = state_at(use.weight, use.site, tuple(batch))
        if plan.static and not RANGES & set(state):
            raise PlanError(
                f"This call uses {use.site}, for which calibration fixed no scale of its inputs. "
                "Make the plan, and calibrate, with the call you want to run."
            )
        if use.op == "conv":
            return Met(plan=plan, state=state)
        stored = [use.weight.axes[axis] for axis in contracted]
        return Met(
            plan=plan,
            state=state,
            order=tuple(sorted(range(len(stored)), key=stored.__getitem__)),
            sharding=weight_sharding(use.weight, self.plan),
            choices=self.choices,
            layer=use.weight.layer,
        )

    def product(self, site: str, path: str, operands: Sequence[Any], eqn: Any) -> Any:
        return infer_product(self.plan, site, operands, eqn, self.backend)

    def leave(self, weight: Weight, eqn: Any, reason: str | None) -> Any:
        check_readable(weight, f"read as an array ({reason or 'elsewhere'})")
        leaf = self.plan.by_path[weight.path]
        if leaf.elsewhere == "dequantize" or not self.rounding:
            return plain(weight)
        where = ""
        if eqn is not None:
            where = f", at {source_info_util.summarize(eqn.source_info)}"
            reason = reason or f"{eqn.primitive.name} reads it"
        raise PlanError(
            f"{weight.path} is quantized, but needed as an array{where}: "
            f"{reason}. Say elsewhere='dequantize' in its rule, or leave it as it is."
        )

    def merge(self, site: str, a: Any, b: Any) -> Any:
        return a

    def empty(self, site: str, struct: Any) -> Any:
        return struct

    def reduce(self, site: str, value: Any) -> Any:
        return value

    def for_derivatives(self) -> "Infer":
        for site in self.plan.sites:
            if site.op == PRODUCT and site.activations is not None:
                raise TypeError(NO_GRADIENT.format(site.activations))
        return Infer(self.plan, backend=self.backend, rounding=False)


def _keeps_codes(met: Met) -> bool:
    """Whether a site has an adapter, and no other state, and rounds no inputs."""
    plain_inputs = met.plan.activations is None and met.layer is None
    return met.plan.adapter is not None and plain_inputs and set(met.state) <= ADAPTER


class Observe:
    """Mode *observe*: computes as the float model does; observers see what each site multiplies."""

    tracks_constants = False
    collects = True
    products = False
    flattens = False
    trains = False
    reads_stacks = False

    def __init__(self, observers: Sequence[Any], *, collecting: bool = True):
        self.observers = {o.name: o for o in observers}
        self.collects = collecting

    def compute(self, uses: Sequence[Use], operands: Sequence[Any], eqn: Any) -> tuple[Any, Any]:
        watched = [use for use in uses if self.collects and observed(use)]
        stats = {
            use.site: measure(use, use.operands, self.observers.values(), use.memo)
            for use in watched
        }
        return bind_plain(eqn, operands), stats

    def product(self, site: str, path: str, operands: Sequence[Any], eqn: Any) -> Any:
        return bind_plain(eqn, operands)

    def leave(self, weight: Weight, eqn: Any, reason: str | None) -> Any:
        return plain(weight)

    def merge(self, site: str, a: Any, b: Any) -> Any:
        return {name: o.merge(a[name], b[name]) for name, o in self.observers.items()}

    def empty(self, site: str, struct: Any) -> Any:
        return {name: o.empty(struct[name]) for name, o in self.observers.items()}

    def reduce(self, site: str, value: Any) -> Any:
        def over_devices(name: str, part: Any) -> Any:
            leaves = jax.tree.leaves(part)
            axes = {tuple(jax.typeof(x).manual_axis_type.varying) for x in leaves}
            # All of a statistic is made of the same rows, and varies as they do.
            (names,) = axes
            return self.observers[name].reduce(part, names) if names else part

        return {name: over_devices(name, part) for name, part in value.items()}

    def for_derivatives(self) -> "Observe":
        return Observe(list(self.observers.values()), collecting=False)
