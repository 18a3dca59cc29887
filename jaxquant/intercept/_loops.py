"""Entering `scan` and `while`: what is the same in every step stays outside.

Weights that a loop does not change are taken out of its carry. Statistics of a scan are stacked for
weights of which each step gets a slice, and added up for the others.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..ops.dot import Layer
from ..qarray import Layout, relayout, retile
from ._evaluate import Evaluator, shape_of
from ._modes import ListSites
from ._shared import share, unshare
from ._states import state_first
from ._weight import is_weight, Joined, Position, same_view, Weight


def scan_counts(params: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def scan_rule(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    params = eqn.params
    num_consts, num_carry = scan_counts(params)
    consts, init, xs = (
        operands[:num_consts],
        operands[num_consts : num_consts + num_carry],
        operands[num_consts + num_carry :],
    )
    jaxpr = params["jaxpr"]
    if ev.mode.flattens:
        return _unrolled(ev, eqn, operands, position)
    xs = [_stack_first(_by_steps(ev, eqn, x)) for x in xs]
    first_slices = jax.tree.map(_first_slice, xs)

    def trial(ev: Evaluator, full: list[Any], slices: Sequence[Any]) -> list[Any]:
        handed = [_sliced(x, whole, position) for x, whole in zip(slices, xs, strict=True)]
        return ev.closed(jaxpr, [*consts, *full, *handed], position)

    fixed = _unchanged(init, trial, first_slices)
    moving = [_leave_carry(ev, eqn, value) for i, value in enumerate(init) if i not in fixed]
    handed_on: dict[int, Any] = {}

    def run(carry: Sequence[Any], slices: Sequence[Any], index: Any = None) -> Any:
        handed = [_sliced(x, whole, position, index) for x, whole in zip(slices, xs, strict=True)]
        full = _interleave(fixed, carry, num_carry)
        outs, stats = ev.scoped(jaxpr, [*consts, *full, *handed], position)
        news = [ev.array(out, eqn) for i, out in enumerate(outs[:num_carry]) if i not in fixed]
        ys = outs[num_carry:]
        # Slices that every step hands out again are the stack that came in.
        handed_on.update(
            (i, xs[j]) for i, y in enumerate(ys) for j in _alone(xs) if same_view(y, handed[j])
        )
        ys = [ev.array(y, eqn) for i, y in enumerate(ys) if i not in handed_on]
        return news, ys, stats

    shapes = {}
    if ev.mode.collects:
        _, _, shapes = jax.eval_shape(run, moving, first_slices)
    stacked = {site for site in shapes if position in ev.scans[site]}
    summed = {s: ev.mode.empty(s, shape) for s, shape in shapes.items() if s not in stacked}

    def step(state: Any, given: tuple[Sequence[Any], Any]) -> Any:
        carry, total = state
        news, ys, stats = run(carry, *given)
        total = {site: ev.mode.merge(site, have, stats[site]) for site, have in total.items()}
        return (news, total), (ys, share({site: stats[site] for site in stacked}))

    (final, summed), (ys, layers) = lax.scan(
        step,
        (moving, summed),
        (xs, jnp.arange(params["length"], dtype=jnp.int32) if ev.mode.reads_stacks else None),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    ev.add({**summed, **unshare(layers)})
    ys = _interleave(handed_on, ys, len(eqn.outvars) - num_carry)
    return [*_interleave(fixed, final, num_carry), *ys]


def _unrolled(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    """The steps of a scan one after the other; every step's sites have the same ids.

    The mode says what a step sees of a stacked weight: `Mark.step`.
    """
    mode: Any = ev.mode
    params = eqn.params
    num_consts, num_carry = scan_counts(params)
    consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
    xs = [_by_steps(ev, eqn, x) for x in operands[num_consts + num_carry :]]
    order = range(params["length"])
    ys: dict[int, list[Any]] = {}
    for step in reversed(order) if params["reverse"] else order:
        slices = [mode.step(x, step, position) for x in xs]
        outs = ev.closed(params["jaxpr"], [*consts, *carry, *slices], position)
        carry = outs[:num_carry]
        ys[step] = [ev.array(y, eqn) for y in outs[num_carry:]]
    stacked = [jnp.stack([ys[i][j] for i in order]) for j in range(len(eqn.outvars) - num_carry)]
    return [*carry, *stacked]


def _first_slice(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def _sliced(value: Any, whole: Any, position: Position, index: Any = None) -> Any:
    """What one step of a loop sees of a stacked weight, of which it is entry `index`."""
    if isinstance(whole, Joined):
        parts = zip(value.parts, whole.parts, strict=True)
        sliced = tuple(_sliced(part, stacked, position, index) for part, stacked in parts)
        return Joined(parts=sliced, axis=whole.axis - 1)
    if not is_weight(whole):
        return value
    scans = (*whole.scans, position)
    layer = None
    if index is not None and whole.quantized and whole.layer is None:
        layer = Layer(stack=whole.value, index=index)
    return dataclasses.replace(
        whole,
        value=value.value,
        axes=whole.axes[1:],
        scans=scans,
        state=value.state,
        state_axes=whole.state_axes[1:],
        layer=layer,
        trained=value.trained,
    )


def _by_steps(ev: Evaluator, eqn: Any, x: Any) -> Any:
    if not isinstance(x, Joined) or x.axis:
        return x
    return ev.leave(x, eqn, "scan steps through the arrays of which it was put together")


def _stack_first(x: Any) -> Any:
    """A stacked weight whose stack axis is stored first, with scales of its own for each slice."""
    if isinstance(x, Joined):
        return dataclasses.replace(x, parts=tuple(map(_stack_first, x.parts)))
    if not is_weight(x) or not x.quantized:
        return x
    q = retile(x.value, 0, 1)
    permutation = q.layout.permutation(q.ndim)
    if permutation[0] != 0:
        rest = tuple(a - q.ndim for a in permutation if a != 0)
        packed = q.layout.packed if permutation[-1] != 0 else None
        q = relayout(q, Layout(order=rest, packed=packed, wide=q.layout.wide))
    return state_first(x.view(q, x.axes))


def _unchanged(init: Sequence[Any], body: Callable[..., list[Any]], *rest: Any) -> dict[int, Any]:
    """Carried weights that every step hands on as they are, by their place in the carry.

    All are taken to be, and the body is tried on shapes; those that turn out to change are taken
    out, until the rest holds. `body(evaluator, carry, *rest)` starts with the next carry.
    """

    def shape(x: Any) -> Any:
        return shape_of(x) if hasattr(x, "shape") else x

    fixed = {i: init[i] for i in _alone(init)}
    while fixed:
        moving = [shape(x) for i, x in enumerate(init) if i not in fixed]
        kept: set[int] = set()

        def step(
            fixed: dict[int, Any], moving: Sequence[Any], *rest: Any, kept: set[int] = kept
        ) -> None:
            full = _interleave(fixed, moving, len(init))
            outs = body(Evaluator(ListSites()), full, *rest)
            kept.update(i for i in fixed if same_view(outs[i], fixed[i]))

        jax.eval_shape(step, fixed, moving, *rest)
        if len(kept) == len(fixed):
            break
        fixed = {i: init[i] for i in sorted(kept)}
    return fixed


def _alone(values: Sequence[Any]) -> list[int]:
    """Places of weights whose parameter stands there once, so that provenance tells them apart."""
    paths = [x.path if isinstance(x, Weight) else None for x in values]
    return [i for i, path in enumerate(paths) if path is not None and paths.count(path) == 1]


def _interleave(fixed: dict[int, Any], moving: Sequence[Any], count: int) -> list[Any]:
    rest = iter(moving)
    return [fixed[i] if i in fixed else next(rest) for i in range(count)]


def _leave_carry(ev: Evaluator, eqn: Any, value: Any) -> Any:
    if not is_weight(value):
        return value
    reason = f"{eqn.primitive.name} carries it and changes it on the way"
    return ev.leave(value, eqn, reason)


def while_rule(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]
    init = operands[n_cond + n_body :]
    body_jaxpr, cond_jaxpr = params["body_jaxpr"], params["cond_jaxpr"]

    def trial(ev: Evaluator, full: list[Any]) -> list[Any]:
        return ev.closed(body_jaxpr, [*body_consts, *full], (*position, "body"))

    fixed = _unchanged(init, trial)
    moving = [_leave_carry(ev, eqn, v) for i, v in enumerate(init) if i not in fixed]

    def holds(carry: Sequence[Any]) -> Any:
        full = _interleave(fixed, carry, len(init))
        outs, stats = ev.scoped(cond_jaxpr, [*cond_consts, *full], (*position, "cond"))
        return outs[0], stats

    def run(carry: Sequence[Any]) -> Any:
        full = _interleave(fixed, carry, len(init))
        outs, stats = ev.scoped(body_jaxpr, [*body_consts, *full], (*position, "body"))
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
