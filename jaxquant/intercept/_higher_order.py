"""Entering primitives that hold jaxprs. The one file that reads their parameters.

Each rule rebuilds the primitive with JAX's public function for it, around a body that is evaluated
with weights.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from ..qarray import constrain, QArray
from ._custom_rules import custom_jvp_rule, custom_vjp_rule
from ._evaluate import Evaluator
from ._joined import constrained
from ._loops import scan_rule, while_rule
from ._shard_map import shard_map_rule
from ._shared import share, unshare
from ._weight import Joined, Position

Rule = Callable[[Evaluator, Any, list[Any], Position], list[Any]]


def _jit(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    params = eqn.params
    if ev.mode.tracks_constants or ev.mode.flattens:
        # Constants stay recognizable; nothing is computed in this mode.
        return ev.closed(params["jaxpr"], operands, position)
    if ev.mode.collects:
        # In line, so that sites in several bodies that read one value share its statistics.
        args = list(map(_constrained, operands, params["in_shardings"]))
        outs = ev.closed(params["jaxpr"], args, position)
        return list(map(_constrained, outs, params["out_shardings"]))

    def body(*args: Any) -> Any:
        args = tuple(map(_constrained, args, params["in_shardings"]))
        outs, stats = ev.scoped(params["jaxpr"], args, position)
        return list(map(_constrained, outs, params["out_shardings"])), stats

    body.__name__ = params["name"]
    options = dict(params["compiler_options_kvs"]) or None
    inline = params["inline"]
    inline = inline if isinstance(inline, bool) else inline.name == "ALWAYS"
    outs, stats = jax.jit(
        body, inline=inline, keep_unused=params["keep_unused"], compiler_options=options
    )(*operands)
    ev.add(stats)
    return outs


def _constrained(value: Any, sharding: Any) -> Any:
    if not isinstance(sharding, jax.sharding.Sharding):
        return value
    if isinstance(value, Joined):
        return constrained(value, sharding, _constrained)
    if isinstance(plain_value := getattr(value, "value", value), QArray):
        if isinstance(sharding, jax.sharding.NamedSharding):
            trained = value.trained
            if trained is not None:
                trained = lax.with_sharding_constraint(trained, sharding)
            return value.view(constrain(plain_value, sharding), value.axes, trained)
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, sharding), value)


def _call(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    return ev.closed(inner, operands, position)


def _remat(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    if ev.mode.flattens:
        return ev.closed(eqn.params["jaxpr"], operands, position)

    def body(*args: Any) -> Any:
        outs, stats = ev.scoped(eqn.params["jaxpr"], args, position)
        return outs, share(stats)

    outs, stats = jax.checkpoint(
        body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
    )(*operands)
    ev.add(unshare(stats))
    return outs


def _cond(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    index, *args = operands
    branches = eqn.params["branches"]

    def branch(i: int) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            outs, stats = ev.scoped(branches[i], args, (*position, i))
            return [ev.array(out, eqn) for out in outs], stats

        return run

    shapes: dict[str, Any] = {}
    for i in range(len(branches) if ev.mode.collects else 0):
        shapes.update(jax.eval_shape(branch(i), *args)[1])

    def full(i: int) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            outs, stats = branch(i)(*args)
            absent = {s: ev.mode.empty(s, shape) for s, shape in shapes.items() if s not in stats}
            return outs, {**stats, **absent}

        return run

    functions = [full(i) for i in range(len(branches))]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        outs, stats = lax.switch(index, functions, *args)
    else:
        # Each branch is lowered for its own platforms only.
        named = {p: f for f, group in zip(functions, platforms, strict=True) for p in group or ()}
        default = next((f for f, p in zip(functions, platforms, strict=True) if p is None), None)
        outs, stats = lax.platform_dependent(*args, default=default, **named)
    ev.add(stats)
    return outs


RULES: dict[str, Rule] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": scan_rule,
    "while": while_rule,
    "cond": _cond,
    "custom_jvp_call": custom_jvp_rule,
    "custom_vjp_call": custom_vjp_rule,
    "shard_map": shard_map_rule,
}
