"""Linen models: wrapped whole, or taken over by an interceptor wherever a module is called."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import Scope
from flax.linen import module as linen_module

from ..qarray import is_qarray, QArray
from ._evaluate import Evaluator, shape_of
from ._modes import Infer
from ._plan import Plan, PlanError
from ._trace import put_back, run, set_aside
from ._variables import COLLECTION, leaf_paths, unstamped


def linen_function(model: nn.Module) -> Callable[..., Any]:
    """`model.apply`, with collections that it hands back as they were set aside."""

    def function(
        variables: Any,
        *args: Any,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> Any:
        out = model.apply(
            variables, *args, mutable=mutable, capture_intermediates=capture_intermediates, **kwargs
        )
        if mutable is False and not capture_intermediates:
            return out
        return out[0], set_aside(variables, out[1])

    return function


class LinenModel:
    """A Linen model that computes as a plan says. Make one with `jaxquant.wrap`."""

    def __init__(self, model: nn.Module, plan: Plan, *, backend: str | None = None):
        self.model = model
        self.plan = plan
        self.backend = backend

    def apply(self, qvariables: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.apply` with quantized variables: the same arguments, the same results.

        **Raises:** `PlanError` if `qvariables` were quantized by another plan.
        """
        variables = checked(qvariables, self.plan)
        evaluator = Evaluator(Infer(self.plan, backend=self.backend))
        paths = leaf_paths(variables)
        function = linen_function(self.model)
        out = run(function, variables, paths, args, kwargs, evaluator, is_codes)
        return put_back(variables, out)

    def __repr__(self) -> str:
        return f"LinenModel({type(self.model).__name__}, plan {self.plan.fingerprint})"


def is_codes(path: str, leaf: Any) -> bool:
    """Whether a leaf enters as a weight: it does if it is quantized."""
    return isinstance(leaf, QArray)


def checked(qvariables: Any, plan: Plan) -> Any:
    """The model's own variables, if `plan` is what they were quantized by.

    **Raises:** `PlanError` otherwise.
    """
    variables, fingerprint = unstamped(qvariables)
    if fingerprint != plan.fingerprint:
        held = "not quantized" if fingerprint is None else f"quantized by the plan {fingerprint}"
        raise PlanError(
            f"These variables are {held}, but the model was wrapped with the plan "
            f"{plan.fingerprint}. Quantize them by it: jaxquant.quantize(variables, plan)."
        )
    return variables


_inside = threading.local()


def interceptor(plan: Plan, *, backend: str | None = None) -> Callable[..., Any]:
    """An interceptor for `flax.linen.intercept_methods` that computes as `plan` says.

    The outermost module called on quantized variables is evaluated as a pure function, under its
    own scope path, RNG streams and counters; what it writes to mutable collections is written
    back. Modules called on ordinary variables are left alone.

    ```python
    with nn.intercept_methods(jq.interceptor(plan)):
        logits = model.apply(qvariables, tokens)
    ```
    """

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if getattr(_inside, "takeover", None) is not None:
            return _inside.takeover.enter(next_fun, args, kwargs)
        scope = context.module.scope
        if scope is None or not _has_codes(scope.root._variables):
            return next_fun(*args, **kwargs)
        checked(scope.root._variables, plan)
        if context.method_name == "setup":
            with _shapes_only(scope.root):
                return next_fun(*args, **kwargs)
        return _take_over(plan, backend, intercept, args, kwargs, context)

    return intercept


def _has_codes(variables: Any) -> bool:
    return any(map(is_qarray, jax.tree.leaves(variables, is_leaf=is_qarray)))


@contextlib.contextmanager
def _shapes_only(root: Scope) -> Iterator[None]:
    """While `setup` runs outside our evaluation, quantized parameters are shapes and no more.

    Submodules are made as usual; parameters that `setup` asks for pass Flax's shape check, and
    cannot be computed with by mistake. The methods themselves run on a fresh copy of the module.
    """
    before = dict(root._variables)
    for name in before:
        root._variables[name] = jax.tree.map(
            lambda x: shape_of(x) if is_qarray(x) else x, before[name], is_leaf=is_qarray
        )
    try:
        yield
    finally:
        root._variables.update(before)


class _Takeover:
    """Which interceptors run while a module is evaluated in our stead.

    Those that surround ours have seen the outermost call already: they are set aside until it is
    under way, then put back for the calls inside it.
    """

    def __init__(self, ours: Any):
        self.stack = linen_module._global_interceptor_stack
        self.ours = ours
        self.outer: list[Any] = []
        self.entered = False

    def enter(self, next_fun: Any, args: Any, kwargs: Any) -> Any:
        if self.entered:
            return next_fun(*args, **kwargs)
        self.entered = True
        self.push()
        try:
            return next_fun(*args, **kwargs)
        finally:
            self.pop()
            self.entered = False

    def pop(self) -> None:
        self.outer = []
        while self.stack and list(self.stack)[-1] is not self.ours:
            self.outer.append(self.stack.pop())

    def push(self) -> None:
        while self.outer:
            self.stack.push(self.outer.pop())


def _take_over(
    plan: Plan, backend: str | None, ours: Any, args: Any, kwargs: Any, context: Any
) -> Any:
    module, scope = context.module, context.module.scope
    path = scope.path
    variables = _under(scope, path)
    counters: dict[str, int] = {}

    def function(variables: Any, *args: Any, **kwargs: Any) -> Any:
        inner = Scope(variables, name=scope.name, mutable=scope.mutable, path=path)
        # The streams and their counters as they stand now: dropout draws the mask it would draw.
        inner.rngs = dict(scope.rngs)
        inner.rng_counters = dict(scope.rng_counters)
        inner.flags = scope.flags
        copy = module.clone(parent=inner, _deep_clone=True)
        out = getattr(copy, context.method_name)(*args, **kwargs)
        counters.update(inner.rng_counters)
        return out, set_aside(variables, inner.mutable_variables())

    takeover = _Takeover(ours)
    evaluator = Evaluator(Infer(plan, backend=backend))
    paths = [None if p is None else "/".join((*path, p)) for p in leaf_paths(variables)]
    _inside.takeover = takeover
    takeover.pop()
    try:
        out, written = run(function, variables, paths, args, kwargs, evaluator, is_codes)
        written = put_back(variables, written)
    finally:
        takeover.push()
        _inside.takeover = None
    scope.rng_counters.update(counters)
    for collection, values in written.items():
        if collection != COLLECTION:
            for name, value in values.items():
                scope.put_variable(collection, name, value)
    return out


def _under(scope: Scope, path: tuple[str, ...]) -> dict[str, Any]:
    """Every collection of the root, seen from `path`; plain dictionaries that may be written to."""
    result: dict[str, Any] = {}
    for collection, values in scope.root._variables.items():
        if collection == COLLECTION:
            continue
        for name in path:
            values = values.get(name, {}) if hasattr(values, "get") else {}
        result[collection] = jax.tree.map(lambda x: x, dict(values), is_leaf=is_qarray)
    return result
