"""Entering `shard_map`: each device sees its own shard of codes and scales."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ..qarray import leaf_specs, retile
from ..qarray._sharding import axes_of, shards_of
from ._evaluate import Evaluator
from ._plan import PlanError
from ._weight import is_weight, Joined, Position, Weight


def shard_map_rule(ev: Evaluator, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
    """The same `shard_map`, around a body that is evaluated with weights.

    A shard needs whole tiles. Where tile boundaries do not fall on shard boundaries, scales are
    repeated for the widest tile that fits both, which changes no value.
    """
    params = eqn.params
    mesh, in_specs = params["mesh"], params["in_specs"]
    fitted = [
        _fit(ev, _unjoined(ev, eqn, x, spec), spec, mesh)
        for x, spec in zip(operands, in_specs, strict=True)
    ]
    specs = tuple(_specs(x, spec, mesh) for x, spec in zip(fitted, in_specs, strict=True))
    manual = params["newly_manual_axes"]

    def body(*args: Any) -> Any:
        with ev.collecting() as stats:
            outs = [ev.array(out, eqn) for out in ev.closed(params["jaxpr"], args, position)]
        if stats and not params["check_vma"]:
            raise PlanError(
                f"Statistics of {next(iter(stats))} cannot be added up over devices: inside "
                "shard_map(check_vma=False) nothing says which values the devices share. Observe "
                "with check_vma=True."
            )
        # Statistics are of all devices' data: replicated ones would be counted once a device.
        return outs, {site: ev.mode.reduce(site, value) for site, value in stats.items()}

    outs, stats = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=specs,
        out_specs=(list(params["out_specs"]), PartitionSpec()),
        axis_names=set(manual),
        check_vma=params["check_vma"],
    )(*fitted)
    ev.add(stats)
    return outs


def _unjoined(ev: Evaluator, eqn: Any, x: Any, spec: PartitionSpec) -> Any:
    """Weights that were put together, unless devices get some of one and some of another."""
    if not isinstance(x, Joined) or [*spec, *[None] * x.ndim][x.axis] is None:
        return x
    return ev.leave(x, eqn, "shard_map cuts the axis along which it was put together with others")


def _specs(x: Any, spec: PartitionSpec, mesh: Any) -> Any:
    """The specs of what a value holds."""
    if isinstance(x, Joined):
        return dataclasses.replace(x, parts=tuple(_specs(part, spec, mesh) for part in x.parts))
    if not is_weight(x):
        return spec
    trained = None if x.trained is None else spec
    specs = x.view(leaf_specs(x.value, spec, mesh) if x.quantized else spec, x.axes, trained)
    if not x.state:
        return specs
    by_group = dict(zip(x.axes, (*spec, *(None,) * x.ndim), strict=False))
    of_state = PartitionSpec(*(by_group.get(group) for group in x.state_axes))
    return specs.with_state(jax.tree.map(lambda _: of_state, x.state))


def _check_state(ev: Evaluator, weight: Weight, axis: int) -> None:
    """Refuses to cut an axis of a weight that state of its sites is about, but for stack axes.

    **Raises:** `PlanError` naming the site.
    """
    group = weight.axes[axis]
    if not weight.state or group in weight.state_axes:
        return
    plan: Any = getattr(ev.mode, "plan", None)
    leaf = plan.by_path[weight.path]
    summed = any(stored in leaf.contracted for stored in group)
    for site, arrays in weight.state.items():
        for name, x in arrays.items():
            about_outputs = name == "outlier_weights"
            if summed and (about_outputs or x.shape[-1] > 1) or about_outputs and not summed:
                what = "inputs" if summed else "outputs"
                raise PlanError(
                    f"shard_map cuts the {what} of {weight.path}, and the {name} of {site} is of "
                    f"all of them. Shard its {'outputs' if summed else 'inputs'} there, or "
                    "calibrate it without."
                )


def _fit(ev: Evaluator, weight: Any, spec: PartitionSpec, mesh: Any) -> Any:
    """The weight with tiles that no shard cuts, knowing which mesh axes cut its axes."""
    if isinstance(weight, Joined):
        fitted = tuple(_fit(ev, part, spec, mesh) for part in weight.parts)
        return dataclasses.replace(weight, parts=fitted)
    if not is_weight(weight):
        return weight
    shards = list(weight.shards or [()] * len(weight.stored))
    value = weight.value
    for axis, entry in enumerate(spec):
        names = axes_of(entry)
        if names and weight.axes[axis]:
            shards[weight.axes[axis][0]] += names
        count = shards_of(entry, mesh)
        if count > 1:
            _check_state(ev, weight, axis)
        if weight.quantized and count > 1 and value.tile[axis] > 1:
            value = retile(value, axis, math.gcd(value.tile[axis], value.shape[axis] // count))
    return dataclasses.replace(weight.view(value, weight.axes), shards=tuple(shards))
