"""State of sites: arrays that belong to a site rather than to its weight.

They live in the collection `jaxquant`, by site id and name, and travel beside their weight through
whatever happens to it, so that they meet the site with one slice a step of a scan over layers. All
begin with the weight's stack axes, in stored order; `k` is the number of its inputs, flattened in
stored order.

| name | shape | meaning |
|---|---|---|
| `smoothing` | `[*stack, k]` | by what inputs are divided, where that was not folded |
| `permutation` | `[*stack, k]` | the input that belongs to each column of the codes, after that |
| `scale` | `[*stack, tiles]` | scales of activations with `static`, a tile along the columns each |
| `zero_point` | `[*stack, tiles]` | their zero points, where the scheme has them |
| `outlier_columns` | `[*stack, m]` | columns whose original weights are known; `k` for none |
| `outlier_weights` | `[*stack, m, n]` | these, `n` the outputs flattened in stored order |
| `offset`, `alpha`, `low`, `high` | `[*stack, tiles]` | what estimators learn or keep in training |
| `peaks` | `[*stack, tiles, history]` | largest magnitudes of earlier steps, where it is delayed |
| `gradient_scale`, `gradient_peaks` | the same | the same of the gradient that arrives |
| `seen` | `[*stack, 2]` | 0; its "gradient" is what a step saw: of inputs, of the gradient |
| `lora_a`, `lora_b` | `[*stack, k, rank]`, `[*stack, rank, n]` | an adapter beside the weight |
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..ops import OutlierWeights
from ._plan import Plan, PlanError
from ._site_plan import SitePlan
from ._weight import Weight

States = Mapping[str, Mapping[str, Any]]
"""Arrays by site id and name."""

REORDERS = ("smoothing", "permutation")
"""With these, codes do not stand for the weight as the model has it."""
RANGES = frozenset({"scale", "alpha", "low"})
"""One of these says how inputs are rounded; but for `scale`, in training alone."""
BETWEEN_STEPS = frozenset({"peaks", "gradient_scale", "gradient_peaks", "seen"})
"""What low-precision training holds beside the scale of inputs."""


def path_of(site: str) -> str:
    """The path of the parameter that a site reads."""
    return site.rpartition("#")[0]


def by_path(
    states: States, plan: Plan, *, training: bool = False
) -> dict[str, tuple[dict[str, dict[str, Any]], Any]]:
    """For each parameter with state: that of its sites, and its stack axes as groups.

    In `training` it is what estimators learn, where they do.

    **Raises:** `PlanError` for state of a site that the plan does not quantize, or that lacks what
    the plan says is there.
    """
    for site in states:
        if site not in plan.by_site or plan.by_site[site].weights is None:
            raise PlanError(
                f"The variables hold state of {site}, which the plan {plan.fingerprint} does not "
                "quantize. Use the plan that they were quantized by."
            )
    result: dict[str, Any] = {}
    for site in plan.sites:
        own = dict(states.get(site.site, {}))
        learned: tuple[str, ...] = ()
        if training and site.training is not None and site.op != "take":
            learned = site.training.held
            learned += site.training.activations.learned if site.static else ()
        lacking = [name for name in learned or _needed(site) if name not in own]
        if lacking:
            raise PlanError(
                f"The plan says that {site.site} has {_why(site)}, but the variables hold no "
                f"{lacking[0]!r} for it. Calibrate them: jaxquant.calibrate(model, variables, "
                "batches, plan)."
            )
        if own:
            leaf = plan.by_path[site.path]
            held, _ = result.setdefault(site.path, ({}, tuple((a,) for a in leaf.stack)))
            held[site.site] = own
    return result


def _needed(site: SitePlan) -> list[str]:
    needed = ["scale"] if site.static else []
    if site.static and site.activations is not None and site.activations.zero_point is not None:
        needed.append("zero_point")
    if site.outliers is not None and site.outliers.weights is OutlierWeights.ORIGINAL:
        needed += ["outlier_columns", "outlier_weights"]
    return needed


def _why(site: SitePlan) -> str:
    return "static activations" if site.static else "original weights of outliers"


def abstract_states(plan: Plan) -> dict[str, dict[str, Any]]:
    """The shapes of what the plan needs, where it fixes them: static scales and zero points.

    Of original weights there may be any number; one column is as good as another.

    **Raises:** `PlanError` where the tiles of static scales do not fill the inputs.
    """
    result: dict[str, dict[str, Any]] = {}
    for site in plan.sites:
        needed = _needed(site)
        if not needed:
            continue
        leaf = plan.by_path[site.path]
        stack, k, n = leaf.matrix
        assert site.activations is not None
        tile = site.activations.tile.contracted or k
        if site.static and k % tile:
            raise PlanError(
                f"Tiles of {tile} do not fill the {k} inputs of {site.site}. Use a divisor, or "
                "None for one scale in all."
            )
        zero = site.activations.zero_point
        shapes = {
            "scale": ((*stack, k // tile), np.float32),
            "zero_point": ((*stack, k // tile), None if zero is None else zero.storage),
            "outlier_columns": ((*stack, 1), np.int32),
            "outlier_weights": ((*stack, 1, n), np.dtype(leaf.dtype)),
        }
        result[site.site] = {name: jax.ShapeDtypeStruct(*shapes[name]) for name in needed}
    return result


def _group_of(weight: Weight, axis: int) -> int | None:
    """Which leading axis of its state the present `axis` of a weight is, if any.

    **Raises:** `ValueError` where it is a part of one, or several.
    """
    group = weight.axes[axis]
    if group in weight.state_axes:
        at = weight.state_axes.index(group)
        if all(x.shape[at] == weight.shape[axis] for x in jax.tree.leaves(weight.state)):
            return at
    if any(stored in held for held in weight.state_axes for stored in group):
        raise ValueError(
            f"axis {axis} of {weight.path} is made of parts of its stack axes, and the state of "
            "its sites cannot be cut so"
        )
    return None


def cut_state(weight: Weight, axis: int, start: Any, size: int) -> Weight:
    """The weight with its state cut along the present `axis`, if that is a stack axis.

    **Raises:** `ValueError` where the state cannot be cut so.
    """
    if not weight.state or size == weight.shape[axis]:
        return weight
    at = _group_of(weight, axis)
    if at is None:
        return weight
    return weight.with_state(
        jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, at), weight.state)
    )


def _fronted(weight: Weight, axes: tuple[int, ...]) -> tuple[Any, tuple[tuple[int, ...], ...]]:
    """The state with one leading axis for each of the present `axes`, and the groups that follow.

    **Raises:** `ValueError` where the state has no slices that are those of an axis.
    """
    groups = [weight.axes[axis] for axis in axes]
    places: list[list[int]] = []
    for group in groups:
        wanted = [group] if group in weight.state_axes else [(stored,) for stored in group]
        places.append([weight.state_axes.index(g) for g in wanted if g in weight.state_axes])
    taken = [place for each in places for place in each]
    sizes = [weight.shape[axis] for axis in axes]

    def move(x: Any) -> Any:
        for axis, each, size in zip(axes, places, sizes, strict=True):
            if math.prod(x.shape[place] for place in each) != size:
                raise ValueError(
                    f"axis {axis} of {weight.path}, of {size} slices, is none of its stack axes, "
                    "so that the state of its sites has none for each"
                )
        x = jnp.moveaxis(x, taken, range(len(taken)))
        return x.reshape(*sizes, *x.shape[len(taken) :])

    rest = (group for i, group in enumerate(weight.state_axes) if i not in taken)
    return jax.tree.map(move, weight.state), tuple(rest)


def state_first(weight: Weight) -> Weight:
    """The weight with the axis of its state that belongs to its first axis in front.

    **Raises:** `ValueError` where there is no such axis.
    """
    if not weight.state:
        return weight
    state, rest = _fronted(weight, (0,))
    return weight.with_state(state, (weight.axes[0], *rest))


def state_at(weight: Weight, site: str, batch: tuple[int, ...]) -> dict[str, Any]:
    """The state of `site` with one leading axis for each of the present axes `batch`, in order.

    **Raises:** `PlanError` where that is not to be had, or where other state of the weight means
    that its codes are not what this site would take them for.
    """
    check_readable(weight, f"read by {site}", weight.state.get(site, {}))
    if site not in weight.state:
        return {}
    try:
        state, rest = _fronted(weight, batch)
    except ValueError as error:
        raise PlanError(f"{site} cannot have its state: {error}.") from error
    own = dict(state[site])
    for name, x in own.items():
        alone = tuple(range(len(batch), len(batch) + len(rest)))
        if any(x.shape[a] != 1 for a in alone):
            raise PlanError(
                f"{site} reads one slice of {weight.path}, but its {name} of shape {x.shape} is "
                "that of several. Calibrate the model as it is called."
            )
        own[name] = lax.squeeze(x, alone)
    return own


def check_readable(weight: Weight, how: str, own: Mapping[str, Any] = {}) -> None:
    """Refuses a weight whose codes stand for something else than the weight as the model has it.

    **Raises:** `PlanError` naming the site for which they were made.
    """
    for site, arrays in weight.state.items():
        for name in REORDERS:
            if name in arrays and name not in own:
                raise PlanError(
                    f"{weight.path} is held for {site}, with a {name} of its inputs, and cannot be "
                    f"{how} as the model has it. Calibrate it without, or leave it by a rule."
                )
