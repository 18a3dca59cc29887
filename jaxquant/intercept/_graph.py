"""The flat graph of a model: every equation in order, loops over layers unrolled, sites known.

It is what calibration runs on: folds are found in it, and the driver cuts it into segments.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from ._evaluate import Evaluator
from ._front import leaf_shape, pure_function
from ._mark import Mark, MarkedSite, Root, root_p, site_p
from ._trace import is_array, run
from ._variables import leaf_paths, unstamped

# Bodies of these are put in line: of the model itself nothing else than values is asked here.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One equation: `inputs` are numbers of values, or literals; `outputs` numbers of values.

    For a site, `eqn` is the equation of the model, and `mark` says what it reads.
    """

    eqn: Any
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]
    mark: MarkedSite | None = None

    @property
    def reads(self) -> tuple[int, ...]:
        """The values among its inputs, each once."""
        return tuple(dict.fromkeys(x for x in self.inputs if isinstance(x, Value)))

    @property
    def name(self) -> str:
        return self.eqn.primitive.name


class Value(int):
    """The number of a value of the graph; literals among inputs are of other types."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """Values by number; `steps` are in an order in which they can be evaluated.

    `roots` are parameters and slices of stacked ones; `variables` other leaves of the variables
    (running statistics, caches), by their place among all leaves; `constants` are arrays that the
    model closes over; `arguments` those that it is called with. `unreached` are parameters that a
    site cannot be marked for, and why: control flow that has no fixed sequence of equations.
    """

    steps: tuple[Step, ...]
    avals: dict[int, Any]
    roots: dict[int, Root]
    variables: dict[int, int]
    constants: dict[int, Any]
    arguments: tuple[int, ...]
    outputs: tuple[Any, ...]
    unreached: dict[str, str]

    @functools.cached_property
    def sites(self) -> tuple[Step, ...]:
        """The steps that are sites, in order."""
        return tuple(step for step in self.steps if step.mark is not None)

    @functools.cached_property
    def moving(self) -> frozenset[int]:
        """The values that depend on the arguments."""
        moving = set(self.arguments)
        for step in self.steps:
            if any(value in moving for value in step.reads):
                moving.update(step.outputs)
        return frozenset(moving)

    @functools.cached_property
    def makers(self) -> dict[int, Step]:
        """The step that makes each value, if one does."""
        return {value: step for step in self.steps for value in step.outputs}

    @functools.cached_property
    def users(self) -> dict[int, tuple[Step, ...]]:
        """The steps that read each value."""
        users: dict[int, list[Step]] = {}
        for step in self.steps:
            for value in step.reads:
                users.setdefault(value, []).append(step)
        return {value: tuple(steps) for value, steps in users.items()}


def trace(model: Any, variables: Any, *args: Any, **kwargs: Any) -> Graph:
    """The graph of a call. Shapes suffice for variables and arguments; nothing is computed.

    **Raises:** `PlanError` where a scan steps through parameters that are not stored as a stack.
    """
    function = pure_function(model)
    variables, _ = unstamped(variables)
    shapes = jax.tree.map(leaf_shape, variables)
    paths = leaf_paths(shapes)
    arguments, tree = jax.tree.flatten((args, kwargs))
    moving = [i for i, x in enumerate(arguments) if is_array(x)]
    mode = Mark()

    def marked(leaves: list[Any], moved: list[Any]) -> Any:
        full = list(arguments)
        for i, x in zip(moving, moved, strict=True):
            full[i] = x
        args, kwargs = jax.tree.unflatten(tree, full)
        own = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        out = run(function, own, paths, args, kwargs, Evaluator(mode), lambda path, x: True)
        return [x for x in jax.tree.leaves(out) if is_array(x)]

    leaves = jax.tree.leaves(shapes)
    closed = jax.make_jaxpr(marked)(leaves, [leaf_shape(arguments[i]) for i in moving])
    flat = _Flat(mode)
    numbers = [flat.new(var.aval) for var in closed.jaxpr.invars]
    outputs = flat.body(closed.jaxpr, closed.consts, numbers)
    for i, path in enumerate(paths):
        if path is None:
            flat.variables[numbers[i]] = i
        else:
            flat.roots[numbers[i]] = Root(path=path)
    return Graph(
        steps=tuple(flat.steps),
        avals=flat.avals,
        roots=flat.roots,
        variables=flat.variables,
        constants=flat.constants,
        arguments=tuple(numbers[len(leaves) :]),
        outputs=tuple(outputs),
        unreached=mode.unreached,
    )


def evaluate_step(step: Step, values: Mapping[int, Any]) -> list[Any]:
    """The outputs of one equation, as the model computes them."""
    inputs = [values[x] if isinstance(x, Value) else x.val for x in step.inputs]
    params = step.eqn.primitive.get_bind_params(step.eqn.params)
    with step.eqn.ctx.manager:
        out = step.eqn.primitive.bind(*inputs, **params)
    return list(out) if step.eqn.primitive.multiple_results else [out]


class _Flat:
    """Puts bodies in line and numbers values."""

    def __init__(self, mode: Mark) -> None:
        self.mode = mode
        self.steps: list[Step] = []
        self.avals: dict[int, Any] = {}
        self.roots: dict[int, Root] = {}
        self.variables: dict[int, int] = {}
        self.constants: dict[int, Any] = {}
        self._known: dict[int, Value] = {}
        self._slices: dict[Root, Value] = {}

    def new(self, aval: Any) -> Value:
        value = Value(len(self.avals))
        self.avals[value] = aval
        return value

    def constant(self, array: Any, aval: Any) -> Value:
        if id(array) not in self._known:
            self._known[id(array)] = self.new(aval)
            self.constants[self._known[id(array)]] = array
        return self._known[id(array)]

    def body(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.constant(const, var.aval)

        def read(atom: Any) -> Any:
            return atom if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            ins = [read(atom) for atom in eqn.invars]
            for var, out in zip(eqn.outvars, self.equation(eqn, ins), strict=True):
                env[var] = out
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        if eqn.primitive is root_p:
            root = eqn.params["root"]
            if root not in self._slices:
                self._slices[root] = self.new(eqn.outvars[0].aval)
                self.roots[self._slices[root]] = root
            return [self._slices[root]]
        inner = eqn.params.get(_INLINED.get(eqn.primitive.name, ""))
        if inner is not None:
            opened = getattr(inner, "jaxpr", inner)
            return self.body(opened, getattr(inner, "consts", ()), inputs)
        outputs = [self.new(var.aval) for var in eqn.outvars]
        mark = None
        if eqn.primitive is site_p:
            mark = self.mode.marks[eqn.params["mark"]]
            eqn = mark.eqn
        self.steps.append(Step(eqn=eqn, inputs=tuple(inputs), outputs=tuple(outputs), mark=mark))
        return outputs
