"""Mode *simulate*: the forward of mode infer, on codes made in the call, with gradients past them.

A parameter that the plan quantizes enters as a pair: its codes, on which sites compute as they will
in inference, and itself, which gradients reach. What the codes of activations stand for sends its
gradient on to the activations in the same way. On the way back a site is the float product of what
its operands stand for.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..ops import preferred_backend
from ..qarray import dequantize, is_qarray, QArray, relayout
from ..training import (
    Dot,
    in_codes,
    MovingAverage,
    rounded,
    rounded_gradient,
    Rounding,
    straight_through,
    Training,
)
from ._compute import compute
from ._conditioned import along, Met
from ._evaluate import Use
from ._inputs import measure
from ._joined import plain, Sliced
from ._modes import Infer, Observe
from ._observers import Extremes
from ._placed import gathered, undivided
from ._plan import LeafPlan, Plan, PlanError, SitePlan
from ._prepare import deciding, stored_layout
from ._products import bind_plain, dot_of_codes, planned_product
from ._roles import ragged_axes
from ._states import BETWEEN_STEPS
from ._weight import is_weight, Weight

_PLAIN = Training()


class Simulate(Infer):
    """Mode *simulate*. Weights have a `trained` array beside their codes."""

    trains = True

    def __init__(
        self,
        plan: Plan,
        *,
        backend: str | None = None,
        strength: Any = None,
        watching: bool = False,
        gather: frozenset[str] = frozenset(),
    ):
        super().__init__(plan, backend=backend)
        self.gather = gather
        self.reads_stacks = False
        self.strength = strength
        self.collects = watching
        self._observe = Observe((Extremes(),))

    def compute(self, uses: Sequence[Use], operands: Sequence[Any], eqn: Any) -> tuple[Any, Any]:
        plans = self.met(uses)
        seen = self._seen(uses, plans)
        sides = [self._side(side, x, plans, eqn) for side, x in enumerate(operands)]
        anchors, held = zip(*sides, strict=True)
        if not any(isinstance(x, QArray) for x in held):
            return eqn.primitive.bind(*anchors, **eqn.params), seen
        if self.strength is not None:
            values = map(functools.partial(part_way, self.strength), anchors, held)
            return eqn.primitive.bind(*values, **eqn.params), seen
        # What state does with inputs was done; what is left of a plan is not traced.
        settings = {side: self._settings(met) for side, met in plans.items()}

        def product(held: Sequence[Any]) -> Any:
            return compute(eqn, list(held), settings, self.backend)

        def linear(*values: Any) -> Any:
            return eqn.primitive.bind(*values, **eqn.params)

        dot = _way_back(eqn, plans, anchors, held, self.backend)
        if dot is not None:
            state = plans[1 - dot.inputs].state
            moved = (state.get("gradient_scale"), state.get("seen"))
            return in_codes(product, dot, anchors, held, *moved), seen
        rounds = _gradient(eqn, uses, plans)
        return straight_through(product, linear, anchors, held, rounds), seen

    def _seen(self, uses: Sequence[Use], plans: Mapping[int, Met]) -> dict[str, Any]:
        """Least and largest inputs of sites whose ranges are averages over steps."""
        watched = [
            use
            for use in uses
            if self.collects and use.side in plans and moves(plans[use.side].plan)
        ]
        operands = [[lax.stop_gradient(plain(x)) for x in use.operands] for use in watched]
        return {
            use.site: measure(use, own, (Extremes(),))
            for use, own in zip(watched, operands, strict=True)
        }

    def merge(self, site: str, a: Any, b: Any) -> Any:
        return self._observe.merge(site, a, b)

    def empty(self, site: str, struct: Any) -> Any:
        return self._observe.empty(site, struct)

    def reduce(self, site: str, value: Any) -> Any:
        return self._observe.reduce(site, value)

    def _side(self, side: int, x: Any, plans: Mapping[int, Met], eqn: Any) -> tuple[Any, Any]:
        """What gradients of an operand reach, and what the site computes on."""
        if is_weight(x):
            if side in plans:
                x = self._whole(x)
                return x.trained, x.value
            array = self.array(x)
            return array, array
        met = plans.get(1 - side)
        axes = None if met is None else _inputs(eqn, side)
        if met is None or axes is None or met.plan.activations is None:
            x = plain(x) if isinstance(x, Sliced) else x
            return x, x
        return activations(x, met, *axes)

    def _whole(self, weight: Weight) -> Weight:
        """The weight as sites compute on it: with codes that are gathered, if that is asked for."""
        return gathered(weight, self.plan, self.gather) if self.gather else weight

    def _settings(self, met: Met) -> Met:
        lies = met.sharding
        if lies is not None and self.gather:
            lies = undivided(lies, self.gather)
        return dataclasses.replace(met.without_state(), sharding=lies)

    def product(self, site: str, path: str, operands: Sequence[Any], eqn: Any) -> Any:
        """A product of two activations: as in mode infer, differentiated in the same way."""
        scheme = planned_product(self.plan, site).activations
        if scheme is None:
            return bind_plain(eqn, operands)
        sides = []
        for x, summed, stack in zip(operands, *eqn.params["dimension_numbers"], strict=True):
            own = Rounding(scheme=scheme, contracted=tuple(summed), stack=tuple(stack))
            sides.append(rounded(own, plain(x), {}))
        anchors, held = zip(*sides, strict=True)
        if self.strength is not None:
            values = map(functools.partial(part_way, self.strength), anchors, held)
            return bind_plain(eqn, values)
        return straight_through(
            lambda held: dot_of_codes(held[0], held[1], eqn, self.backend),
            lambda *values: bind_plain(eqn, values),
            anchors,
            held,
        )

    def array(self, weight: Weight) -> Any:
        """The array that a weight's codes stand for, whose gradient reaches what is trained."""
        weight = self._whole(weight)
        if self.strength is not None:
            return part_way(self.strength, weight.trained, weight.value)
        return straight_through(
            lambda held: plain(held[0]), lambda x: x, (weight.trained,), (weight.value,)
        )

    def leave(self, weight: Weight, eqn: Any, reason: str | None) -> Any:
        super().leave(weight, eqn, reason)
        return self.array(weight)

    def for_derivatives(self) -> "Simulate":
        return self


def check_trainable(plan: Plan) -> None:
    """Checks that what the plan does can be trained through.

    **Raises:** `PlanError` naming a site that is scaled by data, or keeps outliers apart.
    """
    for site in plan.sites:
        if site.outliers is not None or site.scaling is not None:
            what = (
                "keeps outliers apart" if site.scaling is None else f"is scaled by {site.scaling}"
            )
            raise PlanError(
                f"{site.site} {what}, which is made for weights that no longer change. Train by a "
                "recipe without, and calibrate what was trained."
            )


def moves(site: SitePlan) -> bool:
    """Whether ranges of a site's inputs are averages over steps."""
    training = site.training if site.static and site.op != "take" else None
    return training is not None and isinstance(training.activations, MovingAverage)


def part_way(strength: Any, anchor: Any, held: Any) -> Any:
    """`v + strength (v_hat - v)`, whose derivative is 1: a warm-up from float to quantized."""
    if not isinstance(held, QArray):
        return held
    moved = dequantize(held, jnp.float32) - anchor.astype(jnp.float32)
    return anchor + lax.stop_gradient(jnp.asarray(strength, jnp.float32) * moved).astype(
        anchor.dtype
    )


def _inputs(eqn: Any, side: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The summed and the batched axes of what a weight is multiplied with, if it is `side`."""
    match eqn.primitive.name:
        case "dot_general":
            summed, batch = eqn.params["dimension_numbers"]
            return tuple(summed[side]), tuple(batch[side])
        case "conv_general_dilated":
            return (tuple(eqn.params["dimension_numbers"].lhs_spec[1:]), ()) if side == 0 else None
        case "ragged_dot_general":
            axes = ragged_axes(eqn)
            return ((axes[0][1],), ()) if side == 0 and not isinstance(axes, str) else None
    return None


def _gradient(eqn: Any, uses: Sequence[Use], plans: Mapping[int, Met]) -> Any:
    """What is done to the gradient that arrives at a site: it is rounded, if a rule says so.

    The axes that stand for outputs of the weight are those that it is summed over on its way to the
    inputs.
    """
    for use in uses:
        met = plans.get(use.side)
        training = None if met is None else met.plan.training
        if training is None or training.gradients is None or use.op == "take":
            continue
        outputs, stack = _outputs(eqn, use.side)
        return functools.partial(
            rounded_gradient,
            scheme=training.gradients,
            contracted=outputs,
            stack=stack,
            seed=zlib.crc32(use.site.encode()),
        )
    return None


def _way_back(
    eqn: Any, plans: Mapping[int, Met], anchors: Any, held: Any, backend: str | None
) -> Dot | None:
    """How the products of the way back are computed, where a rule says on codes."""
    for side, met in plans.items():
        training = met.plan.training
        if training is None or training.way_back is None or not all(map(is_qarray, held)):
            continue
        (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
        return Dot(
            numbers=((tuple(left), tuple(right)), (tuple(left_batch), tuple(right_batch))),
            shapes=(tuple(anchors[0].shape), tuple(anchors[1].shape)),
            dtypes=(anchors[0].dtype, anchors[1].dtype),
            schemes=(held[0].scheme, held[1].scheme),
            inputs=1 - side,
            back=training.way_back,
            precision=eqn.params["precision"],
            backend=backend,
        )
    return None


def _outputs(eqn: Any, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a site's result that are the weight's, operand `side`; and the batched ones."""
    ndim = len(eqn.outvars[0].aval.shape)
    match eqn.primitive.name:
        case "dot_general":
            summed, batch = eqn.params["dimension_numbers"]
            count = len(batch[0])
            free = [len(v.aval.shape) - len(summed[i]) - count for i, v in enumerate(eqn.invars)]
            start = count if side == 0 else count + free[0]
            return tuple(range(start, start + free[side])), tuple(range(count))
        case "conv_general_dilated":
            return (eqn.params["dimension_numbers"].out_spec[1],), ()
    return (ndim - 1,), ()


def activations(
    x: Any, met: Met, contracted: tuple[int, ...], batch: tuple[int, ...]
) -> tuple[Any, Any]:
    """Inputs of a site, and their codes; those of a part are cut out of those of the whole."""
    if isinstance(x, Sliced):
        anchor, q = activations(x.whole, met, contracted, batch)
        return x.cut(anchor), x.cut(q)
    scheme, training = met.plan.activations, met.plan.training or _PLAIN
    assert scheme is not None
    summed = met.summed(contracted) if met.plan.static else contracted
    x = plain(x)
    held = {name: part for name, part in met.state.items() if name not in BETWEEN_STEPS}
    learned = {name: along(part, x, summed, batch) for name, part in held.items()}
    features = scheme.tile.contracted or math.prod(x.shape[a] for a in summed)
    return rounded(
        Rounding(
            scheme=scheme,
            contracted=summed,
            stack=batch,
            estimator=training.activations,
            features=features,
        ),
        x,
        learned,
    )


def entered(
    plan: Plan, parameters: Mapping[str, Any], learned: Mapping[str, Any], backend: str | None
) -> dict[str, tuple[Any, QArray]]:
    """The parameters that the plan quantizes, each with its codes as the backend reads them."""
    by_path, backend = deciding(plan), backend or preferred_backend()

    def pair(leaf: LeafPlan) -> tuple[Any, QArray]:
        own = dict(learned.get(leaf.path, {}))
        made: Any = rounded(rounding_of(plan, leaf), parameters[leaf.path], own)
        anchor, q = made
        return anchor, relayout(q, stored_layout(q, by_path[leaf.path], backend))

    return {leaf.path: pair(leaf) for leaf in plan.leaves}


def rounding_of(plan: Plan, leaf: LeafPlan) -> Rounding:
    """How a parameter is rounded in training."""
    training = training_of(plan, leaf.path)
    return Rounding(
        scheme=leaf.scheme,
        contracted=leaf.contracted,
        stack=leaf.stack,
        estimator=training.weights,
    )


def training_of(plan: Plan, path: str) -> Training:
    """How the sites of one parameter are trained."""
    found = (site.training for site in plan.sites if site.path == path and site.weights)
    return next((each for each in found if each is not None), _PLAIN)
