"""Products of two activations, attention's scores and values: quantized where a rule names them.

Both sides are rounded when they meet, with ranges of their own; batched axes are stack axes. Where
the scheme is int8 the sums are int32. Names come from the modules that Linen puts on the name
stack; NNX puts none there, so that its products are told apart by their order alone.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from ..ops import dot_general
from ..qarray import Scheme
from ._conditioned import Met
from ._explicit import typed
from ._joined import plain, rounded
from ._plan import Plan, PlanError, SitePlan
from ._rules import Recipe

PRODUCT = "product"
"""The `op` of these sites."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A product that a trace met; `shape` and `dtype` are those of its result."""

    site: str
    path: str
    shape: tuple[int, ...]
    dtype: Any


def enclosing_names(eqn: Any) -> list[str]:
    """The user's names on an equation: modules and scopes, not transformations, nor einsums."""
    scopes = [x for x in eqn.source_info.name_stack.stack if type(x).__name__ == "Scope"]
    return [scope.name for scope in scopes if "->" not in scope.name]


def product_path(names: Sequence[str]) -> str:
    return "/".join(names)


def plan_product(recipe: Recipe, found: Product) -> SitePlan:
    """What a recipe does with a product."""
    rule = recipe.rule_for(found.path, found.site, product=True)
    scheme = None if rule is None else rule.products
    if scheme is None:
        reason = "no rule names it" if rule is None else f"left by the rule {rule.match!r}"
    else:
        reason = None
    return SitePlan(
        site=found.site,
        path=found.path,
        op=PRODUCT,
        shape=tuple(found.shape),
        dtype=str(np.dtype(found.dtype)),
        roles=None,
        weights=None,
        activations=scheme,
        rule=None if rule is None else rule.match,
        reason=reason,
    )


def planned_product(plan: Plan, site: str) -> SitePlan:
    """What the plan does with a product.

    **Raises:** `PlanError` if it does not know it.
    """
    planned = plan.by_site.get(site)
    if planned is None:
        known = ", ".join(s.site for s in plan.sites if s.op == PRODUCT)
        raise PlanError(
            f"This call computes {site}, which is not in the plan (it has {known}). Make the plan "
            "with the call you want to run."
        )
    return planned


def infer_product(
    plan: Plan, site: str, operands: Sequence[Any], eqn: Any, backend: str | None
) -> Any:
    """The product as its plan says.

    **Raises:** `PlanError` if the plan does not know it, or the scheme's tiles do not fit.
    """
    scheme = planned_product(plan, site).activations
    if scheme is None:
        return bind_plain(eqn, operands)
    contracted, batch = eqn.params["dimension_numbers"]
    try:
        left, right = (
            rounded(x, scheme, contracted=tuple(summed), stack=tuple(stack))
            for x, summed, stack in zip(operands, contracted, batch, strict=True)
        )
    except ValueError as error:
        raise PlanError(f"The sides of {site} cannot be rounded: {error}") from error
    return dot_of_codes(left, right, eqn, backend)


def dot_of_codes(
    left: Any,
    right: Any,
    eqn: Any,
    backend: str | None,
    met: Met | None = None,
    activations: Scheme | None = None,
) -> Any:
    """`ops.dot_general` in place of an equation: its axes, precision, dtype and sharding.

    `met` is the site, where it is one of a weight; `activations`, what the product is to round the
    other side to.
    """
    out = eqn.outvars[0].aval
    settings: dict[str, Any] = {"precision": eqn.params["precision"], "out_dtype": out.dtype}
    if met is not None:
        settings |= {"sharding": met.sharding, "activations": activations}

    def product(left: Any, right: Any, layer: Any) -> Any:
        numbers = eqn.params["dimension_numbers"]
        if met is not None and met.choices is not None:
            met.choices.note(met.plan.site, left, right, numbers, backend, **settings)
        return dot_general(left, right, numbers, backend=backend, layer=layer, **settings)

    y = typed(product, out.sharding, left, right, None if met is None else met.layer)
    if eqn.params.get("out_sharding") is not None:
        y = jax.sharding.reshard(y, eqn.params["out_sharding"])
    return y


def bind_plain(eqn: Any, operands: Iterable[Any]) -> Any:
    """The equation as the float model has it."""
    return eqn.primitive.bind(*map(plain, operands), **eqn.params)
