"""Products of codes, differentiated as the products of what the codes stand for."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..qarray import dequantize, QArray


def straight_through(
    compute: Callable[..., Any],
    linear: Callable[..., Any],
    anchors: Sequence[Any],
    held: Sequence[Any],
    rounds: Callable[[Any], Any] | None = None,
) -> Any:
    """`compute(held)`, differentiated as `linear` of what `held` stands for.

    `held` are QArrays, or arrays that are not rounded; `anchors` the arrays that their gradients
    reach, `None` for those that have none. `linear` is linear in each operand by itself. `rounds`
    is done to the gradient that arrives. None of the functions closes over anything that is traced.
    Only `held` is kept for the way back: of rounded operands these are codes.
    """
    moving = tuple(
        i
        for i, (anchor, x) in enumerate(zip(anchors, held, strict=True))
        if anchor is not None and jnp.issubdtype(x.dtype, jnp.inexact)
    )
    return _straight_through(compute, linear, rounds, moving, tuple(anchors), tuple(held))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _straight_through(
    compute: Any, linear: Any, rounds: Any, moving: Any, anchors: Any, held: Any
) -> Any:
    return compute(held)


def _forward(
    compute: Any, linear: Any, rounds: Any, moving: Any, anchors: Any, held: Any
) -> tuple[Any, Any]:
    return compute(held), held


def _backward(
    compute: Any, linear: Any, rounds: Any, moving: Any, held: Sequence[Any], g: Any
) -> tuple[Any, Any]:
    g = g if rounds is None else rounds(g)
    values = [dequantize(x) if isinstance(x, QArray) else x for x in held]

    def part(*moved: Any) -> Any:
        full = list(values)
        for i, x in zip(moving, moved, strict=True):
            full[i] = x
        return linear(*full)

    _, pull = jax.vjp(part, *(values[i] for i in moving))
    pulled = dict(zip(moving, pull(g), strict=True))
    return tuple(pulled.get(i) for i in range(len(values))), None


_straight_through.defvjp(_forward, _backward)
