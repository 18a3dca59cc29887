"""What a model computes from its variables alone, and what from its arguments: read off its jaxpr.

Two questions need it, and plan and call have to answer them alike. Weights that are put together
stay weights only where nothing else is put beside them: a prompt before the inputs is an input.
A product of two activations is one that no parameter enters, be it quantized or not.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from ._weight import Position

JOINS = ("concatenate", "stack")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dependence:
    """Positions of equations of one call.

    `joins` put together functions of the parameters and of constants. `products` multiply two
    values that both depend on the arguments or on other variables (a cache). `around` are the
    equations whose bodies hold a product.
    """

    joins: frozenset[Position] = frozenset()
    products: frozenset[Position] = frozenset()
    around: frozenset[Position] = frozenset()


NOTHING = Dependence()


def dependence(jaxpr: Any, moving: Sequence[bool], *, with_products: bool = True) -> Dependence:
    """Walks a closed jaxpr; `moving` says which inputs are no parameters.

    Where nobody asks for products, a model that joins nothing is not walked.
    """
    if not _holds(jaxpr.jaxpr, (*JOINS, "dot_general") if with_products else JOINS):
        return NOTHING
    walk = _Walk()
    walk.body(jaxpr, list(moving), ())
    products = frozenset(place for place, found in walk.products.items() if found)
    return Dependence(
        joins=frozenset(place for place, found in walk.joins.items() if found),
        products=products,
        around=frozenset(place[:depth] for place in products for depth in range(1, len(place))),
    )


def _holds(jaxpr: Any, names: Sequence[str]) -> bool:
    return any(
        eqn.primitive.name in names
        or any(_holds(inner, names) for inner in core.jaxprs_in_params(eqn.params))
        for eqn in jaxpr.eqns
    )


class _Walk:
    """Which values move with the arguments. A body that is walked again only moves more."""

    def __init__(self) -> None:
        self.joins: dict[Position, bool] = {}
        self.products: dict[Position, bool] = {}

    def body(self, jaxpr: Any, moving: Sequence[bool], position: Position) -> list[bool]:
        opened = getattr(jaxpr, "jaxpr", jaxpr)
        env: dict[Any, bool] = dict(zip(opened.invars, moving, strict=True))

        def moves(atom: Any) -> bool:
            # What a body closes over is a constant.
            return not isinstance(atom, core.Literal) and env.get(atom, False)

        for i, eqn in enumerate(opened.eqns):
            ins = [moves(atom) for atom in eqn.invars]
            outs = self.equation(eqn, ins, (*position, i))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [moves(atom) for atom in opened.outvars]

    def equation(self, eqn: Any, ins: list[bool], place: Position) -> list[bool]:
        name, params = eqn.primitive.name, eqn.params
        if name in JOINS:
            self.joins[place] = not any(ins)
        elif name == "dot_general":
            floats = all(jnp.issubdtype(atom.aval.dtype, jnp.floating) for atom in eqn.invars)
            self.products[place] = all(ins) and floats
        elif name == "scan":
            return self.scan(params, ins, place)
        elif name == "while":
            return self.loop(params, ins, place)
        elif name == "cond":
            branches = [
                self.body(branch, ins[1:], (*place, i))
                for i, branch in enumerate(params["branches"])
            ]
            return [ins[0] or any(outs) for outs in zip(*branches, strict=True)]
        else:
            inner = params.get("call_jaxpr", params.get("jaxpr"))
            opened = getattr(inner, "jaxpr", inner)
            if len(getattr(opened, "invars", ())) == len(ins) and ins:
                outs = self.body(inner, ins, place)
                if len(outs) == len(eqn.outvars):
                    return outs
        return [any(ins)] * len(eqn.outvars)

    def scan(self, params: Any, ins: list[bool], place: Position) -> list[bool]:
        from ._loops import scan_counts

        consts, carry = scan_counts(params)

        def step(state: list[bool]) -> list[bool]:
            return self.body(
                params["jaxpr"], [*ins[:consts], *state, *ins[consts + carry :]], place
            )

        state, outs = _settled(step, ins[consts : consts + carry])
        return [*state, *outs[carry:]]

    def loop(self, params: Any, ins: list[bool], place: Position) -> list[bool]:
        cond, body = params["cond_nconsts"], params["body_nconsts"]
        consts = ins[cond : cond + body]

        def step(state: list[bool]) -> list[bool]:
            return self.body(params["body_jaxpr"], [*consts, *state], (*place, "body"))

        state, _ = _settled(step, ins[cond + body :])
        self.body(params["cond_jaxpr"], [*ins[:cond], *state], (*place, "cond"))
        return state


def _settled(step: Any, state: list[bool]) -> tuple[list[bool], list[bool]]:
    """What a loop's state comes to, and what the last step put out."""
    while True:
        outs = step(state)
        news = [a or b for a, b in zip(state, outs, strict=False)]
        if news == state:
            return state, outs
        state = news
