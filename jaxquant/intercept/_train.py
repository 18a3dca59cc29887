"""Training with quantization in the loop: start, simulate, convert."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn, nnx

from ..qarray import QArray, Scheme
from ..training import codes_of, first_range, held_scale, MovingAverage, range_from
from ._accumulate import ungrouped
from ._evaluate import Evaluator
from ._front import not_a_model, observe
from ._linen import checked, linen_function, LinenModel
from ._nnx import nnx_function, NNXModel
from ._observers import Extremes, mean_magnitude, Moments
from ._placed import check_gathered
from ._plan import LeafPlan, Plan, PlanError
from ._scales import first_scales, is_delayed, moved_by, without_seen
from ._simulate import check_trainable, entered, moves, rounding_of, Simulate, training_of
from ._states import by_path
from ._trace import run
from ._variables import (
    COLLECTION,
    leaf_paths,
    learned_of,
    map_leaves,
    parameters,
    QuantizationState,
    stamped,
    states_of,
    unstamped,
)


def start_training(
    model: Any,
    variables: Any,
    plan: Plan,
    batches: Iterable[Any] = (),
    *,
    calibrated: Any = None,
    **kwargs: Any,
) -> Any:
    """The variables with what the plan's estimators learn beside them, ready for `simulate`.

    Scales of weights start from the weights, those of activations from what every site sees in
    `batches` (tuples of the call's arguments; the first batch, in the papers), computed by the
    float model. They are float32 arrays in the collection `jaxquant` (Linen) or Variables of the
    type `QuantizationState` (NNX). Static ranges that are not learned are those of `calibrated`,
    which `jaxquant.calibrate` made by a plan with the same sites.

    **Raises:** `ValueError` if ranges of activations are learned and there are no batches, or fixed
    and not `calibrated`; or if a weight is not finite. `PlanError` for weights that are codes.
    """
    known = _floats(variables, plan)
    learned = {
        leaf.path: _first_of_weight(plan, leaf, known[leaf.path])
        for leaf in plan.leaves
        if training_of(plan, leaf.path).weights.learned
    }
    static = [site for site in plan.sites if site.static and site.op != "take"]
    watched = [s for s in static if s.training and s.training.activations.learned]
    watched = [site for site in watched if not is_delayed(site)]
    given = {} if calibrated is None else states_of(calibrated)
    states = first_scales(plan)
    for site in static:
        if site in watched or is_delayed(site):
            continue
        if site.site not in given:
            raise ValueError(
                f"{site.site} has static activations whose ranges are not learned. Give those that "
                "jaxquant.calibrate finds (calibrated=made.qvariables), or an estimator that "
                "learns them: Training(activations=LSQ())."
            )
        states[site.site] = given[site.site]
    if watched:
        observers = (Moments(), Extremes())
        statistics = observe(model, variables, batches, observers=observers, **kwargs)
        for site in watched:
            found = statistics[site.site]
            stack, lead = len(plan.by_path[site.path].stack), found["moments"]["rows"].ndim
            found = ungrouped(observers, found, stack=stack, lead=lead)
            states[site.site] = _first_of_inputs(plan, site, found)
    return stamped(variables, plan.fingerprint, states, learned)


def _floats(variables: Any, plan: Plan) -> dict[str, Any]:
    """The parameters by path.

    **Raises:** `PlanError` if one that the plan quantizes is held as codes.
    """
    known = parameters(variables)
    for leaf in plan.leaves:
        if isinstance(known.get(leaf.path), QArray):
            raise PlanError(
                f"{leaf.path} is held as codes, which have no gradient. Start training from the "
                "float variables, or train adapters beside the codes (jaxquant.add_adapters)."
            )
    return known


def _first_of_weight(plan: Plan, leaf: LeafPlan, w: Any) -> dict[str, Any]:
    rounding = rounding_of(plan, leaf)
    w = jnp.asarray(w)
    tile = rounding.tile(w.shape)
    found = jax.jit(lambda w: first_range(rounding.estimator, w, rounding.scheme, tile))(w)
    for name, part in found.items():
        if not np.isfinite(np.asarray(part)).all():
            raise ValueError(
                f"{leaf.path} holds NaN or infinity, so that no {name} can start from it. Repair "
                "the checkpoint, or leave this parameter by a rule."
            )
    return found


def _first_of_inputs(plan: Plan, site: Any, statistics: Mapping[str, Any]) -> dict[str, Any]:
    """From means of magnitudes, least and largest values of each channel: `[*stack, tiles]`."""
    scheme, estimator = site.activations, site.training.activations
    mean = mean_magnitude(statistics["moments"])
    k = mean.shape[-1]
    tile = scheme.tile.contracted or k
    ends = _ranges(scheme, statistics["extremes"])
    mean = mean.reshape(*mean.shape[:-1], k // tile, tile).mean(-1)
    return range_from(estimator, scheme, mean, ends["low"], ends["high"])


class SimulatedLinen(LinenModel):
    """A Linen model that is trained as a plan says. Make one with `jaxquant.simulate`."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        backend: str | None = None,
        gather: frozenset[str] = frozenset(),
    ):
        super().__init__(model, plan, backend=backend)
        self.gather = gather

    def apply(self, tvariables: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.apply` with variables of `start_training`: the same arguments and results.

        With `strength` (a number, which may be traced) what sites multiply is only part of the way
        from the float value to the rounded one, and is multiplied in float: for a warm-up.

        Where `mutable` names the collection `jaxquant`, ranges that are averages over steps move:
        the collection comes back with the others that were written to.

        **Raises:** `PlanError` if they were started by another plan.
        """
        function = linen_function(self.model)
        mutable = kwargs.get("mutable", False)
        names = [mutable] if isinstance(mutable, str) else mutable
        if not isinstance(names, (list, tuple)) or COLLECTION not in names:
            out, written, _ = _simulated(self, function, tvariables, args, kwargs)
            return out if written is None else (out, written)
        kwargs = {**kwargs, "mutable": [name for name in names if name != COLLECTION]}
        out, written, seen = _simulated(self, function, tvariables, args, kwargs, watching=True)
        own = _moved(tvariables, self.plan, seen)
        return out, {**written, COLLECTION: own[COLLECTION]}


class SimulatedNNX(NNXModel):
    """An NNX model that is trained as a plan says. Make one with `jaxquant.simulate`.

    It holds the parameters (`nnx.Param`) and what is learned beside them (`QuantizationState`);
    `nnx.grad` and `nnx.Optimizer` take both with `wrt=tmodel.wrt`. `variables` are those of
    `start_training`, as they are now. Calls take `strength` too: see `SimulatedLinen.apply`.
    """

    wrt: Any = nnx.Any(nnx.Param, QuantizationState)

    def __init__(
        self,
        model: nnx.Module,
        plan: Plan,
        tvariables: Any,
        *,
        backend: str | None = None,
        gather: frozenset[str] = frozenset(),
    ):
        super().__init__(model, plan, tvariables, backend=backend, training=True)
        self.gather = gather
        learned = learned_of(tvariables)
        self._learned_names = tuple((path, name) for path in learned for name in learned[path])
        self._learned = nnx.List(QuantizationState(learned[p][n]) for p, n in self._learned_names)

    @property
    def variables(self) -> Any:
        """The variables as `start_training` gave them, and `convert` takes them."""
        return self._variables(nnx.state(self.model))

    def update_scales(self, gradients: Any, *, axis_name: Any = None) -> Any:
        """`jaxquant.update_scales` on this model, in place; the gradients without what was seen.

        `gradients` are those of `nnx.grad` or `nnx.value_and_grad` with `wrt=tmodel.wrt`.
        """
        held, names = gradients["_states"], self._state_names
        places = {site: i for i, (site, name) in enumerate(names) if name == "seen"}
        seen = {site: {"seen": jnp.asarray(held[i][...])} for site, i in places.items()}
        states, learned = moved_by(self.variables, seen, self.plan, axis_name)
        for (site, name), variable in zip(names, self._states, strict=True):
            variable.set_value(states[site][name])
        for (path, name), variable in zip(self._learned_names, self._learned, strict=True):
            variable.set_value(learned[path][name])
        own = {str(i) for i in places.values()}
        return without_seen(gradients, lambda names: names[0] == "_states" and names[1] in own)

    def _variables(self, state: Any) -> Any:
        learned: dict[str, dict[str, Any]] = {}
        for (path, name), held in zip(self._learned_names, self._learned, strict=True):
            learned.setdefault(path, {})[name] = held.get_value()
        return stamped(state, self.plan.fingerprint, self._state_arrays(), learned)

    def apply(self, tvariables: Any, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """The call as a pure function of the variables; what it writes is dropped.

        **Raises:** `PlanError` if they were started by another plan.
        """
        kwargs = {**kwargs, "method": method}
        function = nnx_function(self.model)
        return _simulated(self, function, tvariables, args, kwargs)[0]

    def _evaluate(self, function: Any, state: Any, args: Any, kwargs: Any, states: Any) -> Any:
        variables = self._variables(state)
        watching = any(map(moves, self.plan.sites))
        out, written, seen = _simulated(self, function, variables, args, kwargs, watching=watching)
        held = states_of(_moved(variables, self.plan, seen))
        for (site, name), variable in zip(self._state_names, self._states, strict=True):
            if site in seen:
                variable.set_value(held[site][name])
        return out, written


def _moved(tvariables: Any, plan: Plan, seen: Mapping[str, Any]) -> Any:
    """The variables with ranges moved towards what a call saw."""
    states = states_of(tvariables)
    for name, statistics in seen.items():
        site, old = plan.by_site[name], states[name]
        assert site.activations is not None and site.training is not None
        estimator = site.training.activations
        assert isinstance(estimator, MovingAverage)
        stack, lead = len(plan.by_path[site.path].stack), statistics["extremes"]["low"].ndim - 1
        found = ungrouped((Extremes(),), statistics, stack=stack, lead=lead)
        new = _ranges(site.activations, found["extremes"])
        states[name] = {key: estimator.moved(old[key], new[key]) for key in ("low", "high")}
    variables, fingerprint = unstamped(tvariables)
    assert fingerprint is not None
    return stamped(variables, fingerprint, states, learned_of(tvariables))


def _ranges(scheme: Scheme, extremes: Mapping[str, Any]) -> dict[str, Any]:
    """Least and largest values by tiles, `[*stack, tiles]`, from those by channels."""
    low, high = extremes["low"], extremes["high"]
    k = low.shape[-1]
    shape = (*low.shape[:-1], k // (scheme.tile.contracted or k), -1)
    return {"low": low.reshape(shape).min(-1), "high": high.reshape(shape).max(-1)}


def _simulated(
    tmodel: SimulatedLinen | SimulatedNNX,
    function: Any,
    tvariables: Any,
    args: Any,
    kwargs: Any,
    *,
    watching: bool = False,
) -> Any:
    """What the function returns and writes, and what was seen of inputs, by site."""
    plan, backend = tmodel.plan, tmodel.backend
    strength = kwargs.pop("strength", None)
    variables = checked(tvariables, plan)
    trained = entered(plan, _floats(variables, plan), learned_of(tvariables), backend)
    mode = Simulate(
        plan, backend=backend, strength=strength, watching=watching, gather=tmodel.gather
    )
    evaluator = Evaluator(mode)
    out, written = run(
        function,
        variables,
        leaf_paths(variables),
        args,
        kwargs,
        evaluator,
        lambda path, leaf: path in trained,
        by_path(states_of(tvariables), plan, training=True),
        trained,
    )
    return out, written, evaluator.stats


@overload
def simulate(
    model: nn.Module, plan: Plan, *, backend: str | None = None, gather: Sequence[str] | str = ()
) -> SimulatedLinen: ...
@overload
def simulate(
    model: nnx.Module,
    plan: Plan,
    tvariables: Any,
    *,
    backend: str | None = None,
    gather: Sequence[str] | str = (),
) -> SimulatedNNX: ...
def simulate(
    model: Any,
    plan: Plan,
    tvariables: Any = None,
    *,
    backend: str | None = None,
    gather: Sequence[str] | str = (),
) -> Any:
    """`model`, computing as `wrap` would have it on the same weights, and differentiable.

    A Linen model gets `apply(tvariables, ...)`. Of an NNX model, give `tvariables`: it holds a copy
    of them, is called as before, and is trained as any other.

    `gather` names mesh axes that cut parameters but not the work (FSDP, ZeRO-3): each device rounds
    its shards, and what devices exchange are codes, at each site where they are multiplied. Where
    parameters lie is in the plan: make it with sharded variables, or with `sharding=`.

    ```python
    tvariables = jq.start_training(model, variables, plan, [(tokens,)])
    tmodel = jq.simulate(model, plan)
    loss, gradients = jax.value_and_grad(lambda v: loss_of(tmodel.apply(v, tokens)))(tvariables)
    ```
    """
    check_trainable(plan)
    axes = frozenset([gather] if isinstance(gather, str) else gather)
    check_gathered(plan, axes)
    if isinstance(model, nn.Module):
        return SimulatedLinen(model, plan, backend=backend, gather=axes)
    if isinstance(model, nnx.Module):
        return SimulatedNNX(model, plan, tvariables, backend=backend, gather=axes)
    raise not_a_model(model)


def convert(tvariables: Any, plan: Plan) -> Any:
    """What was trained, as quantized variables for `wrap`: the codes that the last call made.

    **Raises:** `PlanError` if the variables were not started by this plan; `ValueError` for a
    learned scale that is not positive, or a weight that is not finite.
    """
    variables = checked(tvariables, plan)
    _floats(variables, plan)
    check_learned(tvariables)
    learned = learned_of(tvariables)

    def one(path: str | None, leaf: Any) -> Any:
        planned = None if path is None else plan.by_path.get(path)
        if planned is None:
            return leaf
        rounding = rounding_of(plan, planned)
        own = learned.get(planned.path, {})
        return jax.jit(lambda w, own: codes_of(w, own, rounding))(leaf, own)

    states = {}
    for name, own in states_of(tvariables).items():
        scheme = plan.by_site[name].activations
        if scheme is None or not plan.by_site[name].static:
            continue
        scale, zero = held_scale(own, scheme)
        states[name] = {"scale": scale} | ({} if zero is None else {"zero_point": zero})
    return stamped(map_leaves(one, variables), plan.fingerprint, states)


def check_learned(tvariables: Any) -> None:
    """Checks that what is learned can be computed with.

    **Raises:** `ValueError` for a scale, or a range, that is not positive and finite.
    """
    for held in (learned_of(tvariables), states_of(tvariables)):
        for name, parts in held.items():
            for what, part in parts.items():
                values = np.asarray(part, np.float32)
                wrong = ~np.isfinite(values)
                if what in ("scale", "alpha", "gradient_scale"):
                    wrong |= values <= 0
                if wrong.any():
                    raise ValueError(
                        f"The learned {what} of {name} is {values[wrong].min()} in {wrong.sum()} "
                        f"of {values.size} tiles, and has to be positive and finite. Go back to a "
                        "checkpoint before that, with a lower learning rate for what is learned."
                    )
