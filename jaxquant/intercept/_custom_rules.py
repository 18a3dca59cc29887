"""Entering `custom_jvp` and `custom_vjp`: the user's derivative rules stay in force.

The forward function is evaluated with weights inside a new custom rule; when it is differentiated,
the user's rule is evaluated with weights too. Weights have no tangents here: they are frozen codes.
In derivative rules a site computes on codes with activations as they are, and is not a new site.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._evaluate import Evaluator, plain, shape_of
from ._weight import is_weight, Position


def _derivative(ev: Evaluator) -> Evaluator:
    return Evaluator(ev.mode.for_derivatives())


def _plain_all(values: Sequence[Any]) -> list[Any]:
    return [plain(v) for v in values]


def _arrays(ev: Evaluator, eqn: Any, args: Sequence[Any], position: Position) -> tuple[Any, Any]:
    """The forward function's results and statistics."""
    with ev.collecting() as stats:
        outs = ev.closed(eqn.params["call_jaxpr"], args, position)
    return [ev.array(out, eqn) for out in outs], stats


def custom_jvp_rule(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    """`custom_jvp` around a forward function that reads weights."""
    params = eqn.params
    if all(map(is_weight, operands)):
        # A function of codes alone is never differentiated.
        return ev.closed(params["call_jaxpr"], operands, position)

    @jax.custom_jvp
    def function(*args: Any) -> Any:
        return _arrays(ev, eqn, args, position)

    def rule(primals: Any, tangents: Any) -> Any:
        moving = [
            not is_weight(p) and t.dtype != jax.dtypes.float0
            for p, t in zip(primals, tangents, strict=True)
        ]
        zeros = [not m for m in moving]
        jaxpr, consts, out_zeros = params["jvp_jaxpr_fun"].call_wrapped(*zeros)
        given = [t for t, m in zip(tangents, moving, strict=True) if m]
        inner = _derivative(ev)
        outs = _plain_all(inner.evaluate(jaxpr, consts, [*primals, *given], position))
        values, nonzero = outs[: len(out_zeros)], iter(outs[len(out_zeros) :])
        moves = [
            _zero_tangent(value) if zero else next(nonzero)
            for value, zero in zip(values, out_zeros, strict=True)
        ]
        _, stats = function(*primals)
        return (values, stats), (moves, jax.tree.map(_zero_tangent, stats))

    function.defjvp(rule)
    outs, stats = function(*operands)
    ev.add(stats)
    return outs


def _zero_tangent(value: Any) -> Any:
    if jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.zeros_like(value)
    return jnp.zeros(value.shape, jax.dtypes.float0)


def custom_vjp_rule(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    """`custom_vjp` around a forward function that reads weights."""
    params = eqn.params
    if all(map(is_weight, operands)):
        return ev.closed(params["call_jaxpr"], operands, position)

    @jax.custom_vjp
    def function(*args: Any) -> Any:
        return _arrays(ev, eqn, args, position)

    def forward(*args: Any) -> Any:
        nonzero = [not is_weight(a) for a in args]
        jaxpr, consts = params["fwd_jaxpr_thunk"].call_wrapped(*nonzero)
        outs = _derivative(ev).evaluate(jaxpr, consts, args, position)
        _, res_tree, forwarded = params["out_trees"]()
        kept = res_tree.num_leaves - sum(f is not None for f in forwarded)
        saved = iter(outs[:kept])
        residuals = [next(saved) if f is None else args[f] for f in forwarded]
        _, stats = function(*args)
        return (_plain_all(outs[kept:]), stats), (residuals, args)

    def backward(saved: Any, cotangents: Any) -> Any:
        residuals, args = saved
        present: list[bool] = []

        def user_rule(residuals: Any, cotangents: Any) -> Any:
            outs = params["bwd"].call_wrapped(*residuals, *cotangents)
            present[:] = [hasattr(out, "dtype") for out in outs]
            return [out for out in outs if hasattr(out, "dtype")]

        logical = [shape_of(r.value) if is_weight(r) else r for r in residuals]
        closed = jax.make_jaxpr(user_rule)(logical, cotangents[0])
        outs = iter(
            _plain_all(
                _derivative(ev).evaluate(
                    closed.jaxpr, closed.consts, [*residuals, *cotangents[0]], position
                )
            )
        )
        gradients = [next(outs) if there else None for there in present]
        # A weight's own cotangent is that of an array; its codes have none.
        return tuple(
            None if is_weight(arg) else gradient
            for arg, gradient in zip(args, gradients, strict=True)
        )

    function.defvjp(forward, backward)
    outs, stats = function(*operands)
    ev.add(stats)
    return outs
