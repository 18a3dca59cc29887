"""Adding statistics up: over batches, and over devices in an order that their number leaves alone.

Float sums depend on their order in the last bit, and the last bit of a Gram matrix may turn a code.
Here windows come in a fixed unit. The statistics of each unit are computed by one device, on
arrays of the unit's shape, and are added one after the other in the order of the windows, however
many devices share the work and however the windows are dealt out to batches.

Statistics are by site and observer's name. A total is `Shared`, so that what sites share is held
and added once; `unshare(total)` gives it by site.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from ._shared import share, Shared, unshare

Statistics = Mapping[str, Mapping[str, Any]]


def merged(observers: Iterable[Any], a: Statistics, b: Statistics) -> dict[str, dict[str, Any]]:
    """Statistics of two batches; what sites share in both stays shared.

    What only one of the two has is kept as it is.
    """
    by_name = {observer.name: observer for observer in observers}
    known: dict[Any, Any] = {}

    def both(name: str, a: Any, b: Any) -> Any:
        key = (name, *map(id, jax.tree.leaves(a)), *map(id, jax.tree.leaves(b)))
        if key not in known:
            known[key] = by_name[name].merge(a, b)
        return known[key]

    found: dict[str, dict[str, Any]] = {}
    for site in {**a, **b}:
        mine, theirs = a.get(site, {}), b.get(site, {})
        found[site] = {
            name: both(name, mine[name], theirs[name]) if name in mine and name in theirs else part
            for name, part in {**mine, **theirs}.items()
        }
    return found


def ungrouped(
    observers: Iterable[Any], found: Mapping[str, Any], *, stack: int, lead: int
) -> dict[str, Any]:
    """Statistics of one site, in which a convolution's groups are put together.

    They have `lead` leading axes: `stack` of the weight, and one of groups if there are any.
    """
    if lead == stack:
        return dict(found)

    def together(observer: Any, part: Any) -> Any:
        (count,) = {x.shape[stack] for x in jax.tree.leaves(part)}
        groups = (jax.tree.map(lambda x, i=i: x.take(i, axis=stack), part) for i in range(count))
        return functools.reduce(observer.merge, groups)

    return {**found, **{o.name: together(o, found[o.name]) for o in observers}}


def emptied(observers: Iterable[Any], struct: Statistics) -> dict[str, dict[str, Any]]:
    """Statistics of nothing, for those of something (or their shapes); as shared as these."""
    by_name = {observer.name: observer for observer in observers}
    known: dict[Any, Any] = {}

    def nothing(name: str, part: Any) -> Any:
        key = (name, *map(id, jax.tree.leaves(part)))
        if key not in known:
            known[key] = by_name[name].empty(part)
        return known[key]

    return {
        site: {name: nothing(name, part) for name, part in parts.items()}
        for site, parts in struct.items()
    }


def over_units(
    run: Callable[[Any, Any], tuple[Any, Statistics]],
    fixed: Any,
    batch: Any,
    total: Shared | None = None,
    *,
    observers: Sequence[Any],
    unit: int,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> tuple[Any, Shared]:
    """`run` on a batch, unit by unit: its outputs, and `total` with the statistics added.

    `run(fixed, part)` gets `unit` windows, the leading axis of every array in `batch`, and returns
    outputs with the same leading axis, and statistics. `total` is what came of the batches before.
    Call it under `jit`.

    With a `mesh`, its devices along `axis` share the units, each in turn, and every one of them
    holds the total; `fixed` lies on each as a whole. Each unit's statistics go to all devices.
    Windows left over at the end are a smaller unit; units that do not fill a round of devices are
    run by all of them.

    The total is the same to the bit for one device and for several, and for batches of any number
    of whole units.

    **Raises:** `ValueError` for an empty batch, a unit below 1, or arrays of different lengths.
    """
    sizes = {x.shape[0] for x in jax.tree.leaves(batch)}
    if unit < 1 or len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"A batch holds windows along the leading axis of its arrays, taken {unit} at a time; "
            f"got lengths {sorted(sizes)}. Give one window or more, as many in each array, and a "
            "unit of at least 1."
        )
    if mesh is not None:
        # Inside of `shard_map` all axes are manual; outside, nothing here depends on their types.
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    (size,) = sizes
    devices = 1 if mesh is None else mesh.shape[axis]
    full = size // (devices * unit) * devices * unit
    outs: list[Any] = []
    if full:
        # Unit `i` is the one of device `i % devices`: the order of the sum is that of the windows.
        parts = jax.tree.map(lambda x: x[:full].reshape(-1, devices, unit, *x.shape[1:]), batch)
        if total is None:
            first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), parts)
            struct = jax.eval_shape(lambda *args: share(run(*args)[1]), fixed, first)
            total = share(emptied(observers, unshare(struct)))

        def rounds(fixed: Any, total: Shared, parts: Any) -> tuple[Any, Shared]:
            return _rounds(run, fixed, total, parts, observers, axis if mesh is not None else None)

        dealt = PartitionSpec(None, axis)
        out, total = _on(mesh, rounds, (PartitionSpec(), PartitionSpec(), dealt), dealt)(
            fixed, total, parts
        )
        outs.append(jax.tree.map(lambda x: x.reshape(full, *x.shape[3:]), out))
    alone = _on(
        mesh,
        lambda fixed, part: _shared(run(fixed, part)),
        (PartitionSpec(), PartitionSpec()),
        PartitionSpec(),
    )
    for start in range(full, size, unit):
        out, found = alone(fixed, jax.tree.map(lambda x, i=start: x[i : i + unit], batch))
        outs.append(out)
        stats = unshare(found)
        have = emptied(observers, stats) if total is None else unshare(total)
        total = share(merged(observers, have, stats))
    assert total is not None
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs), total


def _on(mesh: Mesh | None, function: Any, in_specs: Any, outs: PartitionSpec) -> Any:
    """`function` on each device, with statistics that all of them hold."""
    if mesh is None:
        return function
    # What the model does in it was not written for a `shard_map`, and need not say what varies.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=(outs, PartitionSpec()), check_vma=False
    )


def _shared(found: tuple[Any, Statistics]) -> tuple[Any, Shared]:
    out, stats = found
    return out, share(stats)


def _rounds(
    run: Any, fixed: Any, total: Shared, parts: Any, observers: Sequence[Any], axis: str | None
) -> tuple[Any, Shared]:
    """What one device does: `parts` are `[rounds, 1, unit, ...]`, and `axis` holds the others."""

    def turn(total: Shared, part: Any) -> tuple[Shared, Any]:
        out, found = _shared(run(fixed, jax.tree.map(lambda x: x[0], part)))
        count = 1 if axis is None else lax.axis_size(axis)
        every = jax.tree.map(lambda x: x[None] if axis is None else lax.all_gather(x, axis), found)

        def add(total: Shared, one: Shared) -> tuple[Shared, None]:
            return share(merged(observers, unshare(total), unshare(one))), None

        total, _ = lax.scan(add, total, every, length=count)
        return total, jax.tree.map(lambda x: x[None], out)

    total, outs = lax.scan(turn, total, parts)
    return outs, total
