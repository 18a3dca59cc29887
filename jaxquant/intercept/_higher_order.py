"""Entering primitives that hold jaxprs. The one file that reads their parameters.

Each rule rebuilds the primitive with JAX's public function for it, around a body that is evaluated
with weights. Weights that a loop does not change are taken out of its carry.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from ..qarray import relayout, retile
from ..qarray._layout import Layout
from ..qarray._qarray import QArray
from ._custom_rules import custom_jvp_rule, custom_vjp_rule
from ._evaluate import Evaluator
from ._shard_map import shard_map_rule
from ._weight import is_weight, Position

Rule = Callable[[Evaluator, Any, list[Any], Position], list[Any]]


def _scoped(
    ev: Evaluator, jaxpr: Any, args: Sequence[Any], position: Position
) -> tuple[list[Any], dict[str, Any]]:
    with ev.collecting() as stats:
        outs = ev.closed(jaxpr, args, position)
    return outs, stats


def _jit(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    params = eqn.params

    def body(*args: Any) -> Any:
        args = tuple(map(_constrained, args, params["in_shardings"]))
        outs, stats = _scoped(ev, params["jaxpr"], args, position)
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
    if isinstance(plain_value := getattr(value, "value", value), QArray):
        from ..qarray import constrain

        return value.view(constrain(plain_value, sharding), value.axes)
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, sharding), value)


def _call(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    return ev.closed(inner, operands, position)


def _remat(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    def body(*args: Any) -> Any:
        return _scoped(ev, eqn.params["jaxpr"], args, position)

    outs, stats = jax.checkpoint(
        body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
    )(*operands)
    ev.add(stats)
    return outs


def _scan_counts(params: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _scan(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    params = eqn.params
    num_consts, num_carry = _scan_counts(params)
    consts, init, xs = (
        operands[:num_consts],
        operands[num_consts : num_consts + num_carry],
        operands[num_consts + num_carry :],
    )
    jaxpr = params["jaxpr"]
    opened = getattr(jaxpr, "jaxpr", jaxpr)
    fixed = _invariant(
        init, opened.invars[num_consts : num_consts + num_carry], opened.outvars[:num_carry]
    )
    moving = [_leave_carry(ev, eqn, value) for i, value in enumerate(init) if i not in fixed]
    xs = [_stack_first(x) for x in xs]

    def run(carry: Sequence[Any], slices: Sequence[Any]) -> Any:
        handed = [_sliced(x, whole, position) for x, whole in zip(slices, xs, strict=True)]
        full = _interleave(fixed, carry, num_carry)
        outs, stats = _scoped(ev, jaxpr, [*consts, *full, *handed], position)
        news = [ev.array(out, eqn) for i, out in enumerate(outs[:num_carry]) if i not in fixed]
        return news, [ev.array(y, eqn) for y in outs[num_carry:]], stats

    shapes = {}
    if ev.mode.collects:
        _, _, shapes = jax.eval_shape(run, moving, jax.tree.map(_first_slice, xs))
    stacked = {site for site in shapes if position in ev.scans[site]}
    summed = {s: ev.mode.empty(s, shape) for s, shape in shapes.items() if s not in stacked}

    def step(state: Any, slices: Sequence[Any]) -> Any:
        carry, total = state
        news, ys, stats = run(carry, slices)
        total = {site: ev.mode.merge(site, have, stats[site]) for site, have in total.items()}
        return (news, total), (ys, {site: stats[site] for site in stacked})

    (final, summed), (ys, layers) = lax.scan(
        step,
        (moving, summed),
        xs,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    ev.add({**summed, **layers})
    return [*_interleave(fixed, final, num_carry), *ys]


def _first_slice(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def _sliced(value: Any, whole: Any, position: Position) -> Any:
    """What one step of a loop sees of a stacked weight."""
    if not is_weight(whole):
        return value
    scans = (*whole.scans, position)
    return dataclasses.replace(whole, value=value.value, axes=whole.axes[1:], scans=scans)


def _stack_first(x: Any) -> Any:
    """A stacked weight whose stack axis is stored first, with scales of its own for each slice."""
    if not is_weight(x) or not x.quantized:
        return x
    q = retile(x.value, 0, 1)
    permutation = q.layout.permutation(q.ndim)
    if permutation[0] != 0:
        rest = tuple(a - q.ndim for a in permutation if a != 0)
        packed = q.layout.packed if permutation[-1] != 0 else None
        q = relayout(q, Layout(order=rest, packed=packed, wide=q.layout.wide))
    return x.view(q, x.axes)


def _invariant(
    init: Sequence[Any], invars: Sequence[Any], outvars: Sequence[Any]
) -> dict[int, Any]:
    """Carried weights that every step hands on as they are, by their place in the carry."""
    return {
        i: value
        for i, (value, before, after) in enumerate(zip(init, invars, outvars, strict=True))
        if is_weight(value) and before is after
    }


def _interleave(fixed: dict[int, Any], moving: Sequence[Any], count: int) -> list[Any]:
    rest = iter(moving)
    return [fixed[i] if i in fixed else next(rest) for i in range(count)]


def _leave_carry(ev: Evaluator, eqn: Any, value: Any) -> Any:
    if not is_weight(value):
        return value
    reason = f"{eqn.primitive.name} carries it and changes it on the way"
    return ev.mode.leave(value, eqn, reason)


def _while(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]
    init = operands[n_cond + n_body :]
    body_jaxpr, cond_jaxpr = params["body_jaxpr"], params["cond_jaxpr"]
    opened = getattr(body_jaxpr, "jaxpr", body_jaxpr)
    fixed = _invariant(init, opened.invars[n_body:], opened.outvars)
    moving = [_leave_carry(ev, eqn, v) for i, v in enumerate(init) if i not in fixed]

    def holds(carry: Sequence[Any]) -> Any:
        full = _interleave(fixed, carry, len(init))
        outs, stats = _scoped(ev, cond_jaxpr, [*cond_consts, *full], (*position, "cond"))
        return outs[0], stats

    def run(carry: Sequence[Any]) -> Any:
        full = _interleave(fixed, carry, len(init))
        outs, stats = _scoped(ev, body_jaxpr, [*body_consts, *full], (*position, "body"))
        news = [ev.array(out, eqn) for i, out in enumerate(outs) if i not in fixed]
        return news, stats

    if not ev.mode.collects:
        final = lax.while_loop(lambda carry: holds(carry)[0], lambda c: run(c)[0], moving)
        return _interleave(fixed, final, len(init))

    # A condition cannot return statistics, so it is evaluated in the body, for the next step.
    def step(state: Any) -> Any:
        carry, _, total = state
        news, stats = run(carry)
        more, asked = holds(news)
        for found in (stats, asked):
            total = {**total, **{s: ev.mode.merge(s, total[s], v) for s, v in found.items()}}
        return news, more, total

    more, asked = holds(moving)
    shapes = jax.eval_shape(run, moving)[1]
    totals = {site: ev.mode.empty(site, shape) for site, shape in shapes.items()}
    final, _, totals = lax.while_loop(lambda s: s[1], step, (moving, more, {**totals, **asked}))
    ev.add(totals)
    return _interleave(fixed, final, len(init))


def _cond(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    index, *args = operands
    branches = eqn.params["branches"]

    def branch(i: int) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            outs, stats = _scoped(ev, branches[i], args, (*position, i))
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
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": custom_jvp_rule,
    "custom_vjp_call": custom_vjp_rule,
    "shard_map": shard_map_rule,
}
