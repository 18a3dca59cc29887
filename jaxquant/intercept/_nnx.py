"""NNX models, wrapped: the same calls, the same state, other arithmetic."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from ._evaluate import Evaluator
from ._linen import checked, is_codes
from ._modes import Infer
from ._plan import Plan, PlanError
from ._states import by_path
from ._trace import run
from ._variables import leaf_paths, parameters, QuantizationState, states_of


def nnx_function(model: nnx.Module) -> Callable[..., Any]:
    """`(state, *args, method=..., **kwargs) -> outputs, None` for a model, as a pure function."""
    graphdef = nnx.graphdef(model)

    def function(state: Any, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        return getattr(nnx.merge(graphdef, state), method)(*args, **kwargs), None

    return function


class _Written:
    """The Variables that a call wrote to or created, in the order in which values come out."""

    def __init__(self) -> None:
        self.variables: list[tuple[tuple[Any, ...], Any]] = []


def _writing_function(graphdef: Any, method: str, written: _Written) -> Callable[..., Any]:
    def function(state: Any, *args: Any, **kwargs: Any) -> Any:
        model = nnx.merge(graphdef, state)
        before = {path: _parts(v) for path, v in nnx.to_flat_state(nnx.state(model))}
        out = getattr(model, method)(*args, **kwargs)
        written.variables = [
            (path, variable)
            for path, variable in nnx.to_flat_state(nnx.state(model))
            # A value nobody wrote to is made of the very tracers that went in.
            if path not in before or _parts(variable) != before[path]
        ]
        return out, [variable.get_value() for _, variable in written.variables]

    return function


def _parts(variable: Any) -> tuple[Any, list[int]]:
    """What a Variable holds, by identity: values that are collections are changed in place."""
    leaves, tree = jax.tree.flatten(variable.get_value())
    return tree, list(map(id, leaves))


class NNXModel(nnx.Module):
    """An NNX model that computes as a plan says. Make one with `jaxquant.wrap`.

    Every method of the model can be called. What a call writes (running statistics, caches, RNG
    counts, sown values) is written to `model`, as it would be without us.
    """

    def __init__(
        self,
        model: nnx.Module,
        plan: Plan,
        qvariables: Any = None,
        *,
        backend: str | None = None,
        training: bool = False,
    ):
        if qvariables is None:
            self.model = model
            self._check_held(plan)
        else:
            self.model = nnx.merge(nnx.graphdef(model), checked(qvariables, plan), copy=True)
        states = {} if qvariables is None else states_of(qvariables)
        by_path(states, plan, training=training)
        # Names of arrays hold slashes, as names of attributes may not.
        self._state_names = tuple((site, name) for site in states for name in states[site])
        self._states = nnx.List(QuantizationState(states[s][n]) for s, n in self._state_names)
        self.plan = plan
        self.backend = backend

    def _check_held(self, plan: Plan) -> None:
        if plan.needs_calibration:
            raise PlanError(
                f"The plan has state of its own for sites that were calibrated, such as "
                f"{plan.needs_calibration[0]}, which the model has not. Give the quantized "
                "variables: jaxquant.wrap(model, plan, qvariables)."
            )
        held = parameters(nnx.state(self.model))
        missing = [path for path in plan.by_path if not is_codes(path, held.get(path))]
        if missing:
            raise PlanError(
                f"The plan quantizes {len(plan.by_path)} parameters, but {missing[0]} of the model "
                "is an ordinary array. Give the quantized variables: "
                "jaxquant.wrap(model, plan, jaxquant.quantize(nnx.state(model), plan))."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that this class does not have: methods of the model.
        if name.startswith("_") or "model" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        attribute = getattr(self.model, name)
        if not callable(attribute) or isinstance(attribute, nnx.Module):
            return attribute
        return lambda *args, **kwargs: self._run(name, args, kwargs)

    def apply(self, qvariables: Any, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """The call as a pure function of quantized variables; what it writes is dropped.

        **Raises:** `PlanError` if `qvariables` were quantized by another plan.
        """
        state = checked(qvariables, self.plan)
        function = nnx_function(self.model)
        kwargs = {**kwargs, "method": method}
        return self._evaluate(function, state, args, kwargs, states_of(qvariables))[0]

    def _evaluate(self, function: Any, state: Any, args: Any, kwargs: Any, states: Any) -> Any:
        evaluator = Evaluator(Infer(self.plan, backend=self.backend))
        paths, held = leaf_paths(state), by_path(states, self.plan)
        return run(function, state, paths, args, kwargs, evaluator, is_codes, held)

    def _state_arrays(self) -> dict[str, dict[str, Any]]:
        """State of sites, by site id and name."""
        states: dict[str, dict[str, Any]] = {}
        for (site, name), held in zip(self._state_names, self._states, strict=True):
            states.setdefault(site, {})[name] = held.get_value()
        return states

    def _run(self, method: str, args: Any, kwargs: Any) -> Any:
        graphdef, state = nnx.split(self.model)
        written = _Written()
        function = _writing_function(graphdef, method, written)
        out, values = self._evaluate(function, state, args, kwargs, self._state_arrays())
        for (path, variable), value in zip(written.variables, values, strict=True):
            _write(self.model, path, variable, value)
        return out


def _write(model: Any, path: tuple[Any, ...], variable: Any, value: Any) -> None:
    """Puts `value` where `path` leads, making the Variable if the call created it."""
    *parents, last = path
    at = model
    for key in parents:
        at = _child(at, key)
    existing = _child(at, last)
    if existing is None:
        created = variable.replace(value)
        if isinstance(at, nnx.Module):
            setattr(at, last, created)
        else:
            at[last] = created
    else:
        existing.set_value(value)


def _child(parent: Any, key: Any) -> Any:
    if isinstance(parent, (list, tuple, nnx.List)) or isinstance(key, int):
        return parent[key]
    if isinstance(parent, dict):
        return parent.get(key)
    return getattr(parent, key, None)
