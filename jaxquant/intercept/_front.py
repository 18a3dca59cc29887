"""The three things a user does with a model and a recipe: plan, wrap, observe."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, overload

import jax
from flax import linen as nn, nnx
from jax.sharding import NamedSharding

from ..qarray import is_qarray
from ..qarray._sharding import is_explicit
from ._accumulate import merged
from ._choices import Choices
from ._evaluate import Evaluator
from ._linen import is_codes, linen_function, LinenModel
from ._modes import Infer, ListSites, Observe
from ._nnx import nnx_function, NNXModel
from ._observers import Moments, Observer, Peak
from ._placed import placed
from ._plan import make_plan, Plan, PlanError
from ._products import plan_product
from ._rules import Recipe
from ._shared import share, Shared, unshare
from ._states import abstract_states, by_path
from ._trace import is_array, run
from ._variables import leaf_paths, map_leaves, parameters, unstamped


def plan(
    model: Any, variables: Any, *args: Any, recipe: Recipe, sharding: Any = None, **kwargs: Any
) -> Plan:
    """What `recipe` would do to every site that `model` reaches with these arguments.

    `variables` are what `model.init` returned (Linen) or `nnx.state(model)` (NNX); shapes suffice,
    as from `jax.eval_shape`, for the arguments too. `args` and `kwargs` are those of `model.apply`
    or of the call. `sharding` is a tree like `variables` with the sharding of each leaf, by default
    that of the leaves themselves; the plan says where scales cannot follow it. Nothing is computed.

    **Raises:** `PlanError` if a rule matches nothing, a site is left out by nobody's wish, or a
    quantized weight would be read in a way that its tiles do not allow.

    ```python
    plan = jq.plan(model, variables, tokens, recipe=jq.recipes.W8A16)
    print(plan)
    ```
    """
    function = pure_function(model)
    variables, _ = unstamped(variables)
    known = parameters(variables)
    quantized = next((path for path, x in known.items() if is_qarray(x)), None)
    if quantized is not None:
        raise PlanError(
            f"{quantized} is quantized already. Make the plan with the variables as they were."
        )
    mode = ListSites(products=recipe.has_products)
    shapes = jax.tree.map(leaf_shape, variables)
    _abstractly(function, shapes, args, kwargs, mode, lambda path, x: True)
    lying = parameters(variables if sharding is None else sharding)
    shardings = {
        path: found
        for path, x in lying.items()
        if isinstance(found := x if sharding is not None else _sharding(x), NamedSharding)
    }
    avals = {path: leaf_shape(x) for path, x in known.items()}
    products = [plan_product(recipe, product) for product in mode.met.values()]
    made = make_plan(recipe, list(mode.uses.values()), mode.others, avals, products)
    made = placed(made, shardings)
    # What breaks tiles shows only with QArrays in place: better now than in the first call.
    held = map_leaves(
        lambda path, x: made.by_path[path].abstract if path in made.by_path else x, shapes
    )
    choices = Choices()
    infer = Infer(made, choices=choices)
    _abstractly(function, held, args, kwargs, infer, is_codes, made)
    return dataclasses.replace(made, backends=choices.rows)


def leaf_shape(x: Any) -> Any:
    """Shape and dtype, with the sharding where that is a part of the type."""
    if not hasattr(x, "shape"):
        return x
    sharding = _sharding(x)
    explicit = isinstance(sharding, NamedSharding) and is_explicit(sharding.mesh)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if explicit else None)


def _sharding(x: Any) -> Any:
    """Where a leaf lies, or a shape is to lie."""
    return getattr(x, "sharding", None)


def pure_function(model: Any) -> Any:
    if isinstance(model, nn.Module):
        return linen_function(model)
    if isinstance(model, nnx.Module):
        return nnx_function(model)
    raise not_a_model(model)


def not_a_model(x: Any) -> TypeError:
    """What is raised for something else than a model."""
    return TypeError(
        f"A model is a flax.linen.Module or a flax.nnx.Module, not {type(x).__name__}."
    )


def _abstractly(
    function: Any,
    variables: Any,
    args: Any,
    kwargs: Any,
    mode: Any,
    tracked: Any,
    plan: Plan | None = None,
) -> None:
    """Runs a mode on shapes alone: on the variables' and on those of array arguments.

    Of the state that a `plan` needs there are shapes too.
    """
    paths = leaf_paths(variables)
    arguments, tree = jax.tree.flatten((args, kwargs))
    moving = [x for x in arguments if is_array(x)]

    def traced(variables: Any, moved: list[Any], states: Any) -> None:
        held = {} if plan is None else by_path(states, plan)
        rest = iter(moved)
        full = [next(rest) if is_array(x) else x for x in arguments]
        args, kwargs = jax.tree.unflatten(tree, full)
        run(function, variables, paths, args, kwargs, Evaluator(mode), tracked, held)

    jax.eval_shape(traced, variables, moving, {} if plan is None else abstract_states(plan))


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
    raise not_a_model(model)


def observe(
    model: Any,
    variables: Any,
    batches: Iterable[Any],
    *,
    observers: Sequence[Observer] = (Moments(), Peak()),
    **kwargs: Any,
) -> dict[str, Any]:
    """Statistics of what every site multiplies its weight with, added up over `batches`.

    Each batch is a tuple of arguments. Returns, by site and observer's name, arrays whose leading
    axes are the weight's stack axes: one slice for each scanned layer (outermost first), then for
    each expert or batched axis, in the order in which they are stored. The rows of a convolution
    are its windows; where it has groups, so do the statistics, after the stack. A lookup
    (`#take`) multiplies nothing, and has no entry.

    Sites that read one value (query, key and value) share its statistics: they hold the same
    arrays. Batches may be sharded over devices, by rows.

    **Raises:** `ValueError` if there are no batches, `PlanError` where a `shard_map` in the model
    deals out what would have to be told apart.

    ```python
    stats = jq.observe(model, variables, [(tokens,)])
    stats["layers/0/mlp/up/kernel#dot"]["peak"]
    ```
    """
    function = pure_function(model)
    variables, _ = unstamped(variables)
    paths = leaf_paths(variables)
    mode = Observe(observers)

    def one(variables: Any, batch: tuple[Any, ...]) -> Shared:
        evaluator = Evaluator(mode)
        run(function, variables, paths, batch, kwargs, evaluator, lambda path, x: True)
        return share(evaluator.stats)

    compiled = jax.jit(one)
    total: dict[str, Any] | None = None
    for batch in batches:
        if not isinstance(batch, tuple):
            raise TypeError(
                f"Each batch is a tuple of the call's arguments, not {type(batch).__name__}. "
                "For one argument write (tokens,)."
            )
        stats = unshare(compiled(variables, batch))
        total = stats if total is None else merged(observers, total, stats)
    if total is None:
        raise ValueError("There were no batches to observe. Give at least one.")
    return total
