"""Entering `custom_jvp` and `custom_vjp`: the user's derivative rules stay in force.

The forward function is evaluated with weights inside a new custom rule. When that is
differentiated, JAX is asked for the derivative of the user's equation on logical shapes, which is
the user's rule as a jaxpr, and this is evaluated with weights too. Weights have no tangents here:
they are frozen codes. In derivative rules a site computes on codes, and is not a new site.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._evaluate import Evaluator, shape_of
from ._joined import plain
from ._weight import is_weight, Position


def custom_jvp_rule(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    """`custom_jvp` around a forward function that reads weights."""
    if ev.mode.trains:
        return _before(ev, eqn, operands)
    if ev.mode.flattens or all(map(is_weight, operands)):
        # A function of codes alone is never differentiated.
        return ev.closed(eqn.params["call_jaxpr"], operands, position)
    moving = list(map(_moves, operands))

    @jax.custom_jvp
    def function(*args: Any) -> Any:
        return _forward(ev, eqn, args, position)

    def tangents_of(args: Sequence[Any], tangents: Sequence[Any]) -> Any:
        part, moved = _in_what_moves(ev, eqn, args, moving)
        outs, moves = jax.jvp(part, moved, tuple(tangents))
        return [move for out, move in zip(outs, moves, strict=True) if _moves(out)]

    def rule(primals: Any, tangents: Any) -> Any:
        given = [t for t, m in zip(tangents, moving, strict=True) if m]
        closed = jax.make_jaxpr(tangents_of)(_logical(primals), given)
        inner = Evaluator(ev.mode.for_derivatives())
        moves = map(plain, inner.closed(closed, [*primals, *given], position))
        values, stats = function(*primals)
        moved = [next(moves) if _moves(value) else _no_tangent(value) for value in values]
        return (values, stats), (moved, jax.tree.map(_no_tangent, stats))

    function.defjvp(rule)
    outs, stats = function(*operands)
    ev.add(stats)
    return outs


def custom_vjp_rule(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    """`custom_vjp` around a forward function that reads weights."""
    if ev.mode.trains:
        return _before(ev, eqn, operands)
    if ev.mode.flattens or all(map(is_weight, operands)):
        return ev.closed(eqn.params["call_jaxpr"], operands, position)
    moving = list(map(_moves, operands))
    pullback: list[Any] = []

    @jax.custom_vjp
    def function(*args: Any) -> Any:
        return _forward(ev, eqn, args, position)

    def with_pullback(args: Sequence[Any]) -> Any:
        part, moved = _in_what_moves(ev, eqn, args, moving)
        outs, pull = jax.vjp(part, *moved)
        residuals, tree = jax.tree.flatten(pull)
        pullback[:] = [tree]
        return outs, residuals

    def forward(*args: Any) -> Any:
        closed = jax.make_jaxpr(with_pullback)(_logical(args))
        outs = Evaluator(ev.mode.for_derivatives()).closed(closed, args, position)
        count = len(eqn.outvars)
        # What the rule saves may be a weight: it is saved as codes.
        _, stats = function(*args)
        return ([plain(out) for out in outs[:count]], stats), outs[count:]

    def backward(residuals: Any, cotangents: Any) -> Any:
        def pull(residuals: Any, cotangents: Any) -> Any:
            return jax.tree.unflatten(pullback[0], residuals)(cotangents)

        closed = jax.make_jaxpr(pull)(_logical(residuals), cotangents[0])
        inner = Evaluator(ev.mode.for_derivatives())
        pulled = map(plain, inner.closed(closed, [*residuals, *cotangents[0]], position))
        return tuple(next(pulled) if m else None for m in moving)

    function.defvjp(forward, backward)
    outs, stats = function(*operands)
    ev.add(stats)
    return outs


def _before(ev: Evaluator, eqn: Any, operands: list[Any]) -> list[Any]:
    """The user's function and its rule on what the codes stand for: the rule says the rest."""
    reason = f"{eqn.primitive.name} has a derivative rule of its own"
    return ev.bind(eqn, [ev.leave(x, eqn, reason) for x in operands])


def _forward(ev: Evaluator, eqn: Any, args: Sequence[Any], position: Position) -> tuple[Any, Any]:
    """The forward function's results and statistics."""
    with ev.collecting() as stats:
        outs = ev.closed(eqn.params["call_jaxpr"], args, position)
    return [ev.array(out, eqn) for out in outs], stats


def _in_what_moves(
    ev: Evaluator, eqn: Any, args: Sequence[Any], moving: Sequence[bool]
) -> tuple[Any, tuple[Any, ...]]:
    """The equation as a function of those operands that have tangents, and their values."""

    def part(*moved: Any) -> Any:
        rest = iter(moved)
        return ev.bind(eqn, [next(rest) if m else x for x, m in zip(args, moving, strict=True)])

    return part, tuple(x for x, m in zip(args, moving, strict=True) if m)


def _moves(x: Any) -> bool:
    """Whether a value has a tangent."""
    return not is_weight(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def _logical(values: Sequence[Any]) -> list[Any]:
    return [shape_of(x) if is_weight(x) else x for x in values]


def _no_tangent(value: Any) -> Any:
    if jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.zeros_like(value)
    return jnp.zeros(value.shape, jax.dtypes.float0)
