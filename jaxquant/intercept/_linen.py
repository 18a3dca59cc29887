"""Linen models: wrapped whole, or taken over by an interceptor wherever a module is called."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core.scope import Scope
from flax.linen import module as linen_module
from jax.extend import source_info_util

from ..qarray import is_qarray, QArray
from ._evaluate import Evaluator
from ._modes import Infer
from ._plan import Plan, PlanError
from ._states import by_path
from ._trace import run
from ._variables import COLLECTION, leaf_paths, named_leaves, states_of, unstamped


def linen_function(model: nn.Module) -> Callable[..., Any]:
    """`model.apply`, returning its output and the collections that it hands back, or `None`."""

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
        return (out, None) if mutable is False and not capture_intermediates else out

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
        states = by_path(states_of(qvariables), self.plan)
        out, written = run(function, variables, paths, args, kwargs, evaluator, is_codes, states)
        return out if written is None else (out, written)

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
        scope = context.module.scope
        if scope is None or not _has_codes(scope.root._variables):
            takeover = getattr(_inside, "takeover", None)
            if takeover is None:
                return next_fun(*args, **kwargs)
            return takeover.enter(next_fun, args, kwargs)
        if _meant_for_another(scope.root, plan):
            return next_fun(*args, **kwargs)
        _check_root(scope.root, plan)
        if context.method_name == "setup":
            # Interceptors inside ours will see the `setup` of the copy that is evaluated.
            with _stand_ins(scope.root):
                return context.orig_method(*args, **kwargs)
        return _take_over(plan, backend, intercept, args, kwargs, context)

    intercept.plan = plan  # pyright: ignore[reportFunctionMemberAccess]
    return intercept


def _meant_for_another(root: Scope, plan: Plan) -> bool:
    """Whether an interceptor for the plan of these variables stands beside ours."""
    _, fingerprint = unstamped(root._variables)
    plans = [getattr(i, "plan", None) for i in linen_module._global_interceptor_stack]
    others = [p.fingerprint for p in plans if isinstance(p, Plan) and p != plan]
    return fingerprint in others


def _has_codes(variables: Any) -> bool:
    """Whether variables were quantized; a plan may have left all of them, but not all products."""
    return COLLECTION in variables or any(
        map(is_qarray, jax.tree.leaves(variables, is_leaf=is_qarray))
    )


def _check_root(root: Scope, plan: Plan) -> None:
    """Refuses variables that another plan quantized."""
    if not root.path or COLLECTION in root._variables:
        checked(root._variables, plan)
        return
    # Inside a lifted transformation the scope holds a part of the variables, without the stamp.
    inside = "/".join((*root.path, ""))
    for site in plan.needs_calibration:
        if site.startswith(inside):
            raise PlanError(
                f"{site} was calibrated, and inside a lifted transformation its state is out of "
                "reach. Intercept the outermost call, or wrap the model: jaxquant.wrap."
            )
    for path, _, leaf in named_leaves(root._variables):
        planned = plan.by_path.get("/".join((*root.path, path)))
        if is_qarray(leaf) and (planned is None or planned.scheme != leaf.scheme):
            raise PlanError(
                f"{'/'.join((*root.path, path))} is held as {leaf.scheme}, which is not what the "
                f"plan {plan.fingerprint} says. Quantize the variables by this plan."
            )


@contextlib.contextmanager
def _stand_ins(root: Scope) -> Iterator[None]:
    """While `setup` runs outside our evaluation, quantized parameters are NaN, and take no memory.

    Submodules are made as usual, and parameters that `setup` asks for pass Flax's shape check. The
    methods themselves run on a fresh copy of the module; what `setup` computed here is not used.
    """
    before = dict(root._variables)

    def stand_in(x: Any) -> Any:
        if not is_qarray(x):
            return x
        return np.broadcast_to(np.asarray(np.nan, x.dtype), x.shape)

    for name in before:
        root._variables[name] = jax.tree.map(stand_in, before[name], is_leaf=is_qarray)
    try:
        yield
    finally:
        for name, value in before.items():
            root._variables[name] = value


class _Takeover:
    """Which interceptors run while a module is evaluated in our stead.

    Those that surround ours have seen the outermost call already: they are set aside until it is
    under way, then put back for the calls inside it.
    """

    def __init__(self, ours: Any):
        # Flax iterates from the innermost to the outermost.
        self.all = list(linen_module._global_interceptor_stack)
        self.inner = self.all[: len(self.all) - self.all[::-1].index(ours)]
        self.entered = False

    def enter(self, next_fun: Any, args: Any, kwargs: Any) -> Any:
        if self.entered:
            return next_fun(*args, **kwargs)
        self.entered = True
        _set_interceptors(self.all)
        try:
            return next_fun(*args, **kwargs)
        finally:
            _set_interceptors(self.inner)
            self.entered = False


def _set_interceptors(interceptors: list[Any]) -> None:
    stack = linen_module._global_interceptor_stack
    while stack:
        stack.pop()
    for interceptor in reversed(interceptors):
        stack.push(interceptor)


def _take_over(
    plan: Plan, backend: str | None, ours: Any, args: Any, kwargs: Any, context: Any
) -> Any:
    module, scope = context.module, context.module.scope
    path = scope.path
    variables = _under(scope)
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
        _uncapture(copy, context.method_name)
        return out, inner.mutable_variables()

    before = getattr(_inside, "takeover", None)
    takeover = _Takeover(ours)
    evaluator = Evaluator(Infer(plan, backend=backend))
    paths = [None if p is None else "/".join((*path, p)) for p in leaf_paths(variables)]
    states = by_path(states_of(scope.root._variables), plan)
    _inside.takeover = takeover
    _set_interceptors(takeover.inner)
    try:
        with _outside_of(context):
            out, written = run(
                function, variables, paths, args, kwargs, evaluator, is_codes, states
            )
    finally:
        _set_interceptors(takeover.all)
        _inside.takeover = before
    scope.rng_counters.update(counters)
    for collection, values in written.items():
        _update(scope._mutable_collection(collection), values)
    return out


def _outside_of(context: Any) -> Any:
    """The name stack without the module's own name, which the copy will put there again."""
    names = source_info_util.current_name_stack()
    own = linen_module._derive_profiling_name(context.module, context.orig_method.func)
    if names.stack and getattr(names.stack[-1], "name", None) == own:
        names = type(names)(names.stack[:-1])
    return source_info_util.user_context(None, name_stack=names)


def _uncapture(module: nn.Module, method: str) -> None:
    """Takes back what `capture_intermediates` kept of the outermost call: Flax will keep it too."""
    stack = linen_module._context.capture_stack
    if stack and stack[-1] and stack[-1](module, method):
        assert module.scope is not None
        kept = module.scope._mutable_collection("intermediates")
        kept[method] = kept[method][:-1]
        if not kept[method]:
            del kept[method]


def _update(old: Any, new: Any) -> None:
    """Writes `new` into `old` leaf by leaf, since other scopes may hold a part of `old`."""
    for name, value in new.items():
        if isinstance(value, Mapping) and isinstance(old.get(name), dict):
            _update(old[name], value)
        else:
            old[name] = value


def _under(scope: Scope) -> dict[str, Any]:
    """Every collection of the root, seen from `scope`; plain dictionaries that may be written."""
    root = scope.root
    result: dict[str, Any] = {}
    for collection, values in root._variables.items():
        if collection == COLLECTION:
            continue
        for name in scope.path[len(root.path) :]:
            values = values.get(name, {}) if isinstance(values, Mapping) else {}
        result[collection] = jax.tree.map(lambda x: x, dict(values), is_leaf=is_qarray)
    return result
