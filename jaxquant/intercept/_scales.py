"""Scales that follow earlier steps: what sites and weights hold for them, and how they move."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..training import Delayed, first_delayed, moved_scale, peaks_by_tile
from ._plan import Plan, PlanError, SitePlan
from ._simulate import rounding_of, training_of
from ._variables import COLLECTION, learned_of, parameters, stamped, states_of, unstamped

Held = dict[str, dict[str, Any]]
"""Arrays by site or path, and name."""


def is_delayed(site: SitePlan) -> bool:
    """Whether the scale of a site's inputs follows earlier steps."""
    return site.training is not None and isinstance(site.training.activations, Delayed)


def first_scales(plan: Plan) -> dict[str, dict[str, Any]]:
    """What sites hold for low-precision training before the first step: scales are 1."""
    states: dict[str, dict[str, Any]] = {}
    for site in plan.sites:
        training = site.training
        if training is None or not training.held or site.op == "take":
            continue
        stack, _, _ = plan.by_path[site.path].matrix
        own: dict[str, Any] = {"seen": jnp.zeros((*stack, 2), jnp.float32)}
        if isinstance(training.activations, Delayed):
            assert site.activations is not None
            own |= first_delayed(training.activations, site.activations.values, (*stack, 1))
        back = training.way_back
        if back is not None and back.scaling is not None:
            first = first_delayed(back.scaling, back.gradients.values, (*stack, 1))
            own |= {f"gradient_{name}": part for name, part in first.items()}
        states[site.site] = own
    return states


def update_scales(
    tvariables: Any, gradients: Any, plan: Plan, *, axis_name: Any = None
) -> tuple[Any, Any]:
    """The variables with scales moved by what a step saw, and its gradients without what it saw.

    For recipes with delayed scaling, between the gradients and the optimizer, once for each
    backward pass; before gradients are summed over passes, or over devices by hand. There, in a
    `shard_map` or `pmap` of the whole step, `axis_name` has the largest magnitudes of all devices
    taken. Weights are looked at as they are in `tvariables`.

    ```python
    loss, gradients = jax.value_and_grad(loss_of)(tvariables)
    tvariables, gradients = jq.update_scales(tvariables, gradients, plan)
    updates, state = optimizer.update(gradients, state, tvariables)
    ```

    **Raises:** `PlanError` if the variables were not started by this plan.
    """
    variables, fingerprint = unstamped(tvariables)
    if fingerprint != plan.fingerprint or fingerprint is None:
        raise PlanError(
            f"The variables were started by the plan {fingerprint}, and this is "
            f"{plan.fingerprint}. Give the plan that start_training was given."
        )
    moved = moved_by(tvariables, states_of(gradients), plan, axis_name)
    return stamped(variables, fingerprint, *moved), without_seen(gradients, is_seen)


def moved_by(
    tvariables: Any, seen: Mapping[str, Mapping[str, Any]], plan: Plan, axis_name: Any
) -> tuple[Held, Held]:
    """The states of sites, and what is held of weights, after a step that saw `seen`."""
    states, learned = states_of(tvariables), learned_of(tvariables)
    known = parameters(unstamped(tvariables)[0])
    for leaf in plan.leaves:
        estimator = training_of(plan, leaf.path).weights
        if isinstance(estimator, Delayed):
            tile = rounding_of(plan, leaf).tile(leaf.shape)
            peak = _over_devices(peaks_by_tile(known[leaf.path], tile), axis_name)
            held = learned[leaf.path]
            learned[leaf.path] = moved_scale(estimator, leaf.scheme.values, held, peak)
    for name, own in states.items():
        if "seen" not in own:
            continue
        site = plan.by_site[name]
        assert site.training is not None and site.activations is not None
        peaks = _over_devices(seen[name]["seen"], axis_name)
        back = site.training.way_back
        if isinstance(site.training.activations, Delayed):
            estimator, format = site.training.activations, site.activations.values
            own |= moved_scale(estimator, format, own, peaks[..., :1])
        if back is not None and back.scaling is not None:
            held = {part: own[f"gradient_{part}"] for part in ("scale", "peaks")}
            moved = moved_scale(back.scaling, back.gradients.values, held, peaks[..., 1:])
            own |= {f"gradient_{part}": moved[part] for part in moved}
    return states, learned


def _over_devices(peaks: Any, axis_name: Any) -> Any:
    return peaks if axis_name is None else lax.pmax(peaks, axis_name)


def is_seen(names: Sequence[str]) -> bool:
    """Whether a leaf of variables, by the names that lead to it, is what steps saw."""
    return names[0] == COLLECTION and "seen" in names


def without_seen(gradients: Any, chosen: Callable[[Sequence[str]], bool]) -> Any:
    """The gradients with zeros for what is none."""

    def one(keys: Any, x: Any) -> Any:
        names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        return jnp.zeros_like(x) if chosen(names) else x

    return jax.tree_util.tree_map_with_path(one, gradients)
