"""What a site multiplies its weight with, laid out as the weight's matrix form is.

`[*stack, rows, k]` in float32: `k` are the contracted axes in the order in which the parameter
stores them, the stack its batched axes in that order too, and rows are all the rest.

A convolution's rows are its windows. Where it has groups, each sees channels (or images) of its
own: then there is one more leading axis, after the stack, of as many entries as groups; rows of the
weight's matrix belong to them in order, as many to each. A ragged product's rows are `Grouped`.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ._evaluate import Use
from ._joined import plain, Sliced
from ._plan import PlanError
from ._roles import ragged_axes
from ._rows import Grouped, Rows
from ._weight import Weight

OBSERVED = ("dot", "conv", "ragged_dot")
"""The kinds of sites that multiply. A lookup does not: there is nothing to observe."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Axis:
    """An axis of the inputs that meets one of the weight, made of the `stored` axes.

    `sizes` are theirs; mesh axes in `names` cut it.
    """

    axis: int
    stored: tuple[int, ...]
    sizes: tuple[int, ...]
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How the rows of a site are made of its operand: all that matters of an equation.

    Sites of equal layouts that read one operand (and one of group sizes) have the same statistics,
    whatever their outputs are, and wherever their weights store the axes that they sum over.

    `window` are the facts of a convolution, `groups` the operand that holds group sizes.
    """

    stack: tuple[_Axis, ...]
    summed: tuple[_Axis, ...]
    window: tuple[Any, ...] = ()
    groups: int | None = None


def observed(use: Use) -> bool:
    """Whether there is something to observe: a product that could be quantized."""
    return use.op in OBSERVED and use.reason is None


def inputs_of(use: Use, operands: Sequence[Any] | None = None) -> Rows:
    """What a site multiplies its weight with (see above).

    `operands` are those of the use where they are not given.

    **Raises:** `PlanError` where a `shard_map` deals out what would have to be told apart, or the
    weight was transposed and merged in a way that its stored order cannot be recovered from;
    `ValueError` for a lookup.
    """
    operands = use.operands if operands is None else operands
    return _rows(layout_of(use), operands[1 - use.side], operands)


def measure(
    use: Use,
    operands: Sequence[Any],
    observers: Iterable[Any],
    memo: dict[Any, Any] | None = None,
) -> dict[str, Any]:
    """What each observer sees at a site, by its name.

    Sites that read one value in one way share its statistics: with the same `memo`, the second
    gets the arrays of the first. A memo holds for one trace: give another one inside of a loop.

    **Raises:** as `inputs_of`.
    """
    memo = {} if memo is None else memo
    layout, x = layout_of(use), operands[1 - use.side]
    sizes = () if layout.groups is None else (operands[layout.groups],)
    key = (layout, _identity(x), *map(id, sizes))

    def rows() -> Rows:
        if key not in memo:
            # The operands are kept, so that no other value gets their identity.
            memo[key] = (_rows(layout, x, operands), operands)
        return memo[key][0]

    found = {}
    for observer in observers:
        if (key, observer) not in memo:
            memo[key, observer] = observer.measure(rows())
        found[observer.name] = memo[key, observer]
    return found


def _identity(x: Any) -> Any:
    if isinstance(x, Sliced):
        return (_identity(x.whole), x.axis, x.start, x.limit)
    return id(x.value if isinstance(x, Weight) else x)


def layout_of(use: Use) -> Layout:
    """How a site reads its inputs: only static facts of the use.

    **Raises:** as `inputs_of`.
    """
    match use.op:
        case "dot":
            layout = _dot_layout(use)
        case "ragged_dot":
            layout = _ragged_layout(use)
        case "conv":
            layout = _conv_layout(use)
        case _:
            raise ValueError(f"{use.site} multiplies nothing; only {OBSERVED} can be observed.")
    present = {stored for axis in use.weight.axes for stored in axis}
    if any(names and stored not in present for stored, names in enumerate(use.weight.shards)):
        raise PlanError(
            f"{use.site} runs on a slice of an axis that a shard_map shards, and statistics of "
            "different devices' slices cannot be stacked. Observe without that sharding."
        )
    return dataclasses.replace(layout, stack=_ranked(layout.stack), summed=_ranked(layout.summed))


def _ranked(axes: Sequence[_Axis]) -> tuple[_Axis, ...]:
    """The axes by the order in which they are stored, not by where; sizes only where one splits."""
    rank = {s: i for i, s in enumerate(sorted(s for axis in axes for s in axis.stored))}
    return tuple(
        dataclasses.replace(
            axis,
            stored=tuple(rank[s] for s in axis.stored),
            sizes=axis.sizes if len(axis.stored) > 1 else (),
        )
        for axis in axes
    )


def _axis(weight: Weight, mine: int, theirs: int) -> _Axis:
    stored = weight.axes[mine]
    return _Axis(
        axis=theirs,
        stored=stored,
        sizes=tuple(weight.stored[s] for s in stored),
        names=weight.shards_of(mine),
    )


def _dot_layout(use: Use) -> Layout:
    contracted, batch = use.eqn.params["dimension_numbers"]
    mine, theirs = use.side, 1 - use.side

    def axes(kind: Any) -> tuple[_Axis, ...]:
        pairs = zip(kind[mine], kind[theirs], strict=True)
        return tuple(_axis(use.weight, int(own), int(other)) for own, other in pairs)

    return Layout(stack=axes(batch), summed=axes(contracted))


def _ragged_layout(use: Use) -> Layout:
    axes = ragged_axes(use.eqn)
    assert not isinstance(axes, str)
    (_, theirs), (experts, mine, _) = axes
    _whole(use, experts, "the experts")
    if len(use.weight.axes[experts]) > 1:
        raise PlanError(
            f"The experts of {use.site} are several stored axes put together, and statistics of "
            "each cannot be told apart. Store them as one axis."
        )
    return Layout(stack=(), summed=(_axis(use.weight, mine, theirs),), groups=2)


def _conv_layout(use: Use) -> Layout:
    """Axes are those of the windows that `_windows` makes: groups, images, channels, places."""
    params, weight = use.eqn.params, use.weight
    numbers = params["dimension_numbers"]
    outputs, channels, *places = numbers.rhs_spec
    for axis in (channels, *places):
        _whole(use, axis, "the inputs")
    features, batches = params["feature_group_count"], params["batch_group_count"]
    stack: tuple[_Axis, ...] = ()
    if features * batches > 1:
        _whole(use, outputs, "the groups")
        leading = _stacked(weight, outputs, features)
        sizes = tuple(weight.stored[s] for s in leading)
        rest = features * batches // math.prod(sizes)
        # The groups that are no stack come last, after all stored axes.
        own = (((len(weight.stored),), (rest,)),) if rest > 1 else (((), ()),)
        stack = (_Axis(axis=0, stored=(*leading, *own[0][0]), sizes=(*sizes, *own[0][1])),)
    return Layout(
        stack=stack,
        summed=(
            _axis(weight, channels, 2),
            *(_axis(weight, place, 4 + 2 * i) for i, place in enumerate(places)),
        ),
        window=(
            tuple(numbers.lhs_spec),
            tuple(weight.shape[place] for place in places),
            tuple(params["window_strides"]),
            tuple(params["padding"]),
            tuple(params["lhs_dilation"] or (1,) * len(places)),
            tuple(params["rhs_dilation"] or (1,) * len(places)),
            features,
            batches,
        ),
    )


def _stacked(weight: Weight, outputs: int, groups: int) -> tuple[int, ...]:
    """The stored axes that a `vmap` merged into the output features, as `_roles` tells them."""
    stored = weight.axes[outputs]
    if len(stored) < 2 or any(weight.stored[s] == 1 for s in stored):
        return ()
    leading = stored[:-1]
    return leading if groups % math.prod(weight.stored[s] for s in leading) == 0 else ()


def _whole(use: Use, axis: int, what: str) -> None:
    if use.weight.shards_of(axis):
        raise PlanError(
            f"{use.site} runs on a part of {what}, which a shard_map deals out, and its statistics "
            "cannot be put together. Observe without that sharding."
        )


def _rows(layout: Layout, x: Any, operands: Sequence[Any]) -> Rows:
    x = plain(x)
    if layout.window:
        x = _windows(x, *layout.window)
    for axis in (*layout.stack, *layout.summed):
        x = _whole_axis(x, axis.axis, axis.names)
    rows = _arranged(x, layout)
    if layout.groups is None:
        return rows
    return Grouped(rows=rows, sizes=plain(operands[layout.groups]))


def _arranged(x: Any, layout: Layout) -> Any:
    """`[*stack, rows, k]`, of which stack and `k` are in the stored order."""
    # Each axis of `x` becomes several where it is made of several stored ones.
    shape: list[int] = []
    labels: list[tuple[int, ...] | None] = []
    summed: list[bool] = []
    by_axis = {a.axis: a for a in (*layout.stack, *layout.summed)}
    for axis, size in enumerate(x.shape):
        found = by_axis.get(axis)
        split = found is not None and len(found.stored) > 1 and math.prod(found.sizes) == size
        shape += found.sizes if found and split else [size]
        if found is None:
            labels.append(None)
        else:
            labels += [(s,) for s in found.stored] if split else [found.stored]
        summed += [found in layout.summed] * (len(labels) - len(summed))
    x = x.reshape(shape)

    def chosen(of_summed: bool) -> list[int]:
        places = [i for i, label in enumerate(labels) if label is not None]
        places = [i for i in places if summed[i] == of_summed]
        places.sort(key=lambda i: labels[i] or ())
        order = [stored for i in places for stored in labels[i] or ()]
        if order != sorted(order):
            raise PlanError(
                "The inputs of a site cannot be laid out as its parameter is stored: it reads a "
                "part of the parameter, whose axes are merged in another order than they are "
                "stored in. Store them in the order in which they are used."
            )
        return places

    stack, inner = chosen(False), chosen(True)
    free = [i for i, label in enumerate(labels) if label is None]
    moved = x.transpose([*stack, *free, *inner])
    lead = moved.shape[: len(stack)]
    rows, k = (math.prod(shape[i] for i in places) for places in (free, inner))
    return lax.reshape(moved, (*lead, rows, k)).astype(jnp.float32)


def _windows(
    x: Any,
    spec: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    stretch: Sequence[int],
    steps: Sequence[int],
    features: int,
    batches: int,
) -> Any:
    """`[groups, images, channels, *(positions, window)]` of images: what each window holds.

    The values themselves: `lax.conv_general_dilated_patches` would multiply by ones, and round.
    """
    x = x.transpose(spec)
    pads = [(low, high, n - 1) for (low, high), n in zip(padding, stretch, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *pads])
    for i, (size, stride, step) in enumerate(zip(sizes, strides, steps, strict=True)):
        axis = 2 + 2 * i
        positions = (x.shape[axis] - (size - 1) * step - 1) // stride + 1
        places = stride * np.arange(max(positions, 0))[:, None] + step * np.arange(size)
        x = jnp.take(x, places.astype(np.int32), axis=axis, mode="clip")
    images, channels, *rest = x.shape
    x = x.reshape(batches, images // batches, features, channels // features, *rest)
    # One of the two counts is 1.
    return jnp.moveaxis(x, 2, 1).reshape(batches * features, *x.shape[1:2], *x.shape[3:])


def _whole_axis(x: Any, axis: int, names: tuple[str, ...]) -> Any:
    """An axis that a `shard_map` cuts, put together again: the same on every device."""
    if not names:
        return x
    size = x.shape[axis]
    shape = list(x.shape)
    shape[axis] *= lax.axis_size(names)
    start = lax.axis_index(names) * size
    return lax.psum(
        lax.dynamic_update_slice_in_dim(jnp.zeros(shape, x.dtype), x, start, axis), names
    )
