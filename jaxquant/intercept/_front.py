"""The three things a user does with a model and a recipe: plan, wrap, observe."""

from collections.abc import Iterable, Sequence
from typing import Any, overload

import jax
from flax import linen as nn, nnx

from ._evaluate import Evaluator
from ._linen import linen_function, LinenModel
from ._modes import ListSites, Observe
from ._nnx import nnx_function, NNXModel
from ._observers import Moments, Observer, Peak
from ._plan import make_plan, Plan
from ._rules import Recipe
from ._trace import run
from ._variables import leaf_paths, parameters, unstamped


def plan(model: Any, variables: Any, *args: Any, recipe: Recipe, **kwargs: Any) -> Plan:
    """What `recipe` would do to every site that `model` reaches with these arguments.

    `variables` are what `model.init` returned (Linen) or `nnx.state(model)` (NNX); shapes suffice,
    as from `jax.eval_shape`. `args` and `kwargs` are those of `model.apply` or of the call. Nothing
    is computed.

    **Raises:** `PlanError` if a rule matches nothing or a site is left out by nobody's wish.

    ```python
    plan = jq.plan(model, variables, tokens, recipe=jq.recipes.W8A16)
    print(plan)
    ```
    """
    mode = ListSites()
    _abstractly(_function(model), variables, args, kwargs, mode)
    shapes = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in parameters(variables).items()
    }
    return make_plan(recipe, list(mode.uses.values()), mode.others, shapes)


def _function(model: Any) -> Any:
    if isinstance(model, nn.Module):
        return linen_function(model)
    if isinstance(model, nnx.Module):
        return nnx_function(model)
    raise TypeError(
        f"A model is a flax.linen.Module or a flax.nnx.Module, not {type(model).__name__}."
    )


def _abstractly(function: Any, variables: Any, args: Any, kwargs: Any, mode: Any) -> Any:
    """Runs a mode on shapes alone: on the variables' and on those of array arguments."""
    variables, _ = unstamped(variables)
    paths = leaf_paths(variables)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)

    def traced(variables: Any) -> Any:
        evaluator = Evaluator(mode)
        return run(function, variables, paths, args, kwargs, evaluator, lambda path, x: True)

    closed = jax.make_jaxpr(lambda v: jax.tree.leaves(traced(v)) and None)
    closed(shapes)


@overload
def wrap(model: nn.Module, plan: Plan, *, backend: str | None = None) -> LinenModel: ...
@overload
def wrap(
    model: nnx.Module, plan: Plan, qvariables: Any = None, *, backend: str | None = None
) -> NNXModel: ...
def wrap(model: Any, plan: Plan, qvariables: Any = None, *, backend: str | None = None) -> Any:
    """`model`, computing at each site as `plan` says; called in the same way.

    A Linen model gets `apply(qvariables, ...)`. An NNX model is called as before and keeps its own
    state: give `qvariables`, unless the model's parameters are QArrays already. `backend` forces
    one backend for every product.

    ```python
    qmodel = jq.wrap(model, plan)
    logits = jax.jit(qmodel.apply)(qvariables, tokens)
    ```
    """
    if isinstance(model, nn.Module):
        return LinenModel(model, plan, backend=backend)
    if isinstance(model, nnx.Module):
        return NNXModel(model, plan, qvariables, backend=backend)
    raise TypeError(
        f"A model is a flax.linen.Module or a flax.nnx.Module, not {type(model).__name__}."
    )


def observe(
    model: Any,
    variables: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    observers: Sequence[Observer] = (Moments(), Peak()),
    **kwargs: Any,
) -> dict[str, Any]:
    """Statistics of what every dot site multiplies its weight with, added up over `batches`.

    Each batch is a tuple of arguments. Returns, by site and observer's name, arrays whose leading
    axes are the weight's stack axes: one slice for each scanned layer.

    **Raises:** `ValueError` if there are no batches.

    ```python
    stats = jq.observe(model, variables, [(tokens,)])
    stats["layers/0/mlp/up/kernel#dot"]["peak"]
    ```
    """
    function = _function(model)
    variables, _ = unstamped(variables)
    paths = leaf_paths(variables)
    mode = Observe(observers)

    def one(variables: Any, batch: tuple[Any, ...]) -> dict[str, Any]:
        evaluator = Evaluator(mode)
        run(function, variables, paths, batch, kwargs, evaluator, lambda path, x: True)
        return evaluator.stats

    compiled = jax.jit(one)
    total: dict[str, Any] | None = None
    for batch in batches:
        if not isinstance(batch, tuple):
            raise TypeError(
                f"Each batch is a tuple of the call's arguments, not {type(batch).__name__}. "
                "For one argument write (tokens,)."
            )
        stats = compiled(variables, batch)
        if total is None:
            total = stats
        else:
            total = {site: mode.merge(site, total[site], stats[site]) for site in stats}
    if total is None:
        raise ValueError("There were no batches to observe. Give at least one.")
    return total
