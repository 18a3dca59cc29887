"""Running parts of a graph compiled: equal parts of a model share one executable."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ..intercept import evaluate_step, Step, Value
from ..intercept._inputs import inputs_of, layout_of, measure
from ._devices import Devices
from ._segments import marked, Part, Segment


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Watch:
    """Statistics of what one site, or several, multiply their weights with.

    `paired` are observers of what two models make of one batch.
    """

    step: Step
    observers: tuple[Any, ...]
    paired: tuple[Any, ...] = ()

    @property
    def facts(self) -> str:
        """What the measured rows depend on beside the value: sites of equal facts share them."""
        return repr((layout_of(marked(self.step).use), self.observers, self.paired))


def in_segment(watch: Watch, segment: Segment) -> Watch:
    """The same watch in the graph of another batch shape, whose values have the same numbers."""
    (same,) = [step for step in segment.sites if step.outputs == watch.step.outputs]
    return dataclasses.replace(watch, step=same)


class Programs:
    """Compiled parts by what they compute. `compiled` counts them."""

    def __init__(self, devices: Devices | None = None) -> None:
        self.devices = devices
        self._programs: dict[Any, Any] = {}
        # Keys are long to make: one for each part that was run, which is kept so that its id holds.
        self._known: dict[Any, tuple[Part, Any, tuple[int, ...]]] = {}

    @property
    def compiled(self) -> int:
        """How many programs were made."""
        return len(self._programs)

    def run(
        self,
        part: Part,
        values: Mapping[int, Any],
        watches: Sequence[Watch] = (),
        *,
        narrow: Any = None,
    ) -> tuple[dict[int, Any], list[dict[str, Any]]]:
        """The outputs of `part` by value, and the statistics of each watch.

        On several devices with a unit, each of these has one more axis in front: an entry for each.
        `narrow` is a dtype in which sites multiply, summing in float32; `None`: as the model does.
        """
        devices = self.devices
        own = (
            id(part),
            tuple(w.facts for w in watches),
            tuple(id(w.step) for w in watches),
            narrow,
        )
        if own not in self._known:
            self._known[own] = (part, *_key(part, watches, narrow))
        _, key, order = self._known[own]
        program = self._programs.get(key)
        if program is None:
            # What the program closes over is the part that is met first: equal ones compute alike.
            run = functools.partial(_run, part, tuple(watches), narrow)
            moving = tuple(v in part.graph.moving for v in order)
            program = jax.jit(run) if devices is None else devices.compiled(run, moving)
            self._programs[key] = program
        inputs = [values[v] for v in order]
        if devices is not None:
            inputs = [
                devices.laid(x) if v in part.graph.moving else x
                for v, x in zip(order, inputs, strict=True)
            ]
        outs, stats = program(inputs)
        return dict(zip(part.outputs, outs, strict=True)), stats

    def run_paired(self, watch: Watch, x: Any, y: Any) -> dict[str, Any]:
        """What the paired observers of a watch make of its value in two models."""
        key = ("paired", watch.facts, str(jax.typeof(x)))
        if key not in self._programs:
            run = functools.partial(_paired, watch)
            both = (True, True)
            self._programs[key] = (
                jax.jit(run) if self.devices is None else self.devices.compiled(run, both)
            )
        return self._programs[key]([x, y])


def _paired(watch: Watch, values: list[Any]) -> dict[str, Any]:
    use = marked(watch.step).use
    rows = [inputs_of(use, [each, each]) for each in values]
    return {observer.name: observer.measure(*rows) for observer in watch.paired}


def _run(part: Part, watches: tuple[Watch, ...], narrow: Any, inputs: list[Any]) -> Any:
    values: dict[int, Any] = dict(zip(_inputs(part, watches), inputs, strict=True))
    for step in part.steps:
        outs = _narrow_site(step, values, narrow) if narrow is not None else None
        outs = evaluate_step(step, values) if outs is None else outs
        values.update(zip(step.outputs, outs, strict=True))
    stats = [_measured(watch, values) for watch in watches]
    return [values[v] for v in part.outputs], stats


def _inputs(part: Part, watches: Sequence[Watch]) -> tuple[int, ...]:
    """What is read from outside: by the equations, then by watches of earlier values."""
    made = {value for step in part.steps for value in step.outputs}
    watched = [v for w in watches for v in w.step.reads if v in part.graph.moving]
    extra = (v for v in watched if v not in made)
    return tuple(dict.fromkeys((*part.inputs, *extra)))


def _measured(watch: Watch, values: Mapping[int, Any]) -> dict[str, Any]:
    use = marked(watch.step).use
    operands = []
    for atom, var in zip(watch.step.inputs, watch.step.eqn.invars, strict=True):
        known = isinstance(atom, Value) and atom in values
        # The weight itself is not measured: its shape will do.
        operands.append(values[atom] if known else jnp.zeros(var.aval.shape, var.aval.dtype))
    return measure(use, operands, watch.observers)


def _narrow_site(step: Step, values: Mapping[int, Any], dtype: Any) -> list[Any] | None:
    """A dot of a site with operands rounded to `dtype` and sums in float32; `None` for others."""
    if step.mark is None or step.name != "dot_general":
        return None
    out = step.eqn.outvars[0].aval
    params = {**step.eqn.params, "preferred_element_type": np.dtype(np.float32)}
    operands = [values[x].astype(dtype) for x in step.inputs]
    return [step.eqn.primitive.bind(*operands, **params).astype(out.dtype)]


def _key(part: Part, watches: Sequence[Watch], narrow: Any) -> tuple[Any, tuple[int, ...]]:
    """What `part` computes, with values numbered by their first appearance; and its inputs."""
    order = _inputs(part, watches)
    numbers = {value: i for i, value in enumerate(order)}

    def atom(x: Any) -> Any:
        if isinstance(x, core.Literal):
            return ("literal", np.asarray(x.val).tobytes(), str(x.aval))
        return numbers[x]

    steps = []
    for step in part.steps:
        for value in step.outputs:
            numbers[value] = len(numbers)
        ins = tuple(map(atom, step.inputs))
        marked = step.mark is not None
        steps.append((step.name, _params(step.eqn.params), ins, len(step.outputs), marked))
    moving = part.graph.moving
    avals = tuple((str(part.graph.avals[value]), value in moving) for value in order)
    outputs = tuple(numbers[value] for value in part.outputs)
    watched = tuple(
        (w.facts, tuple(numbers.get(v) for v in w.step.reads if v in part.graph.moving))
        for w in watches
    )
    return (tuple(steps), avals, outputs, watched, narrow), order


def _params(params: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((name, _fact(value)) for name, value in sorted(params.items()))


def _fact(value: Any) -> Any:
    """Something hashable that is equal only for parameters that mean the same."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
        consts = getattr(value, "consts", ())
        return (str(value), tuple(map(id, consts)))
    if isinstance(value, (tuple, list)):
        return tuple(map(_fact, value))
    if callable(value) and not isinstance(value, type):
        return id(value)
    return repr(value)
