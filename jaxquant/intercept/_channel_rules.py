"""What each operation does to channels: see `_channels`.

A rule gets the book, the equation and the channels of its operands, and gives those of its results.
An operation without a rule, and a use that a rule does not know, fixes what it reads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._channels import any_in, Book, Channels, compressed, FREE, free, reshaped, varies, ZERO
from ._views import cuts


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Operands:
    """Channels and shapes of what an equation reads; `settled` are those that no argument moves."""

    channels: list[Channels]
    shapes: list[tuple[int, ...]]
    settled: list[bool]


Rule = Callable[[Book, Any, Operands], list[Channels]]


def apply_rule(book: Book, eqn: Any, operands: Operands) -> list[Channels]:
    """The channels of each result of `eqn`."""
    name = eqn.primitive.name
    if name not in _ELEMENTWISE:
        for channels in operands.channels:
            book.share(channels)
    rule = _ELEMENTWISE.get(name) or RULES.get(name) or _unknown
    found = [book.resolve(x) for x in rule(book, eqn, operands)]
    ranks = [len(var.aval.shape) for var in eqn.outvars]
    # Scalars among operands of an elementwise operation need not have its rank.
    return [
        x if x.ndim == ndim else x.reshape((1,) * (ndim - x.ndim) + x.shape)
        for x, ndim in zip(found, ranks, strict=True)
    ]


def fixed_along(book: Book, channels: Channels, axes: tuple[int, ...]) -> Channels:
    """The channels once those that vary along one of `axes` are fixed."""
    if not varies(channels, axes):
        return channels
    book.fix(channels)
    return free(channels.ndim)


def product_of_axes(
    book: Book, channels: Channels, other: int, numbers: Any, side: int
) -> Channels:
    """The channels of a `dot_general` one of whose sides has them; `other` is the rank beyond."""
    contracted, batch = numbers
    channels = fixed_along(book, channels, tuple(contracted[side]))
    kept = [a for a in range(channels.ndim) if a not in (*contracted[side], *batch[side])]
    theirs = (1,) * (other - len(contracted[side]) - len(batch[side]))
    order = channels.transpose([*batch[side], *kept, *contracted[side]])
    leading = order.shape[: len(batch[side])]
    own = order.shape[len(leading) : len(leading) + len(kept)]
    return order.reshape((*leading, *own, *theirs) if side == 0 else (*leading, *theirs, *own))


def gathered(book: Book, eqn: Any, channels: Channels, shape: tuple[int, ...]) -> Channels:
    """Rows looked up: axes that are taken whole keep their channels."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    collapsed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    cut = tuple(a for a in range(len(shape)) if a in collapsed or sizes[a] != shape[a])
    channels = fixed_along(book, channels, cut)
    out = [1] * len(eqn.outvars[0].aval.shape)
    present = [a for a in range(len(shape)) if a not in collapsed]
    for axis, place in zip(present, numbers.offset_dims, strict=True):
        out[place] = channels.shape[axis]
    return channels.reshape(out)


def _unknown(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    for channels in x.channels:
        book.fix(channels)
    return [free(len(var.aval.shape)) for var in eqn.outvars]


def _same(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    return x.channels


def _convert(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    kept = jnp.issubdtype(eqn.params["new_dtype"], jnp.floating) or not any_in(x.channels[0])
    return x.channels if kept else _unknown(book, eqn, x)


def _sign(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    return [free(x.channels[0].ndim)]


def _mul(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    """In proportion to both sides; where both have channels, one side's are fixed.

    That is the side with fewer of them; if there are as many, what the last factor is multiplied
    to: the left one, unless the right one moves and the left one is a parameter's.
    """
    a, b = np.broadcast_arrays(*x.channels)
    both = (a >= 0) & (b >= 0)
    if both.any():
        counts = [len(np.unique(side[both])) for side in (a, b)]
        left = counts[0] < counts[1]
        if counts[0] == counts[1]:
            left = not (x.settled[0] and not x.settled[1])
        book.fix((a if left else b)[both])
        a, b = book.resolve(a), book.resolve(b)
    out = np.where(a >= 0, a, b)
    zero = (x.channels[0] == ZERO) | (x.channels[1] == ZERO)
    return [compressed(np.where(zero, np.int32(ZERO), np.where(out >= 0, out, FREE)))]


def _div(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    book.fix(x.channels[1])
    return x.channels[:1]


def _add(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    """Channels of a parameter are tied to those they are added to, not those of two activations.

    Else a residual stream would tie all layers that add to it.
    """
    return [book.meet(*x.channels, tie=any(x.settled))]


def _select(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    book.fix(x.channels[0])
    first, *rest = x.channels[1:]
    for other in rest:
        first = book.meet(first, other, tie=False)
    return [first]


def _compare(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    """Whether `x / s < y / s` does not depend on `s > 0`."""
    return [free(book.meet(*x.channels, tie=False).ndim)]


def _transpose(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    return [x.channels[0].transpose(eqn.params["permutation"])]


def _reshape(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    (channels,), (shape,) = x.channels, x.shapes
    if eqn.params.get("dimensions") is not None:
        order = tuple(eqn.params["dimensions"])
        channels, shape = channels.transpose(order), tuple(shape[a] for a in order)
    return [reshaped(channels, shape, tuple(eqn.params["new_sizes"]))]


def _squeeze(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    return [x.channels[0].squeeze(tuple(eqn.params["dimensions"]))]


def _expand(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    return [np.expand_dims(x.channels[0], tuple(eqn.params["dimensions"]))]


def _broadcast(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    sizes = [1] * len(eqn.params["shape"])
    for place, size in zip(eqn.params["broadcast_dimensions"], x.channels[0].shape, strict=True):
        sizes[place] = size
    return [x.channels[0].reshape(sizes)]


def _cut(channels: Channels, starts: Any, limits: Any, strides: Any = None) -> Channels:
    strides = strides or (1,) * channels.ndim
    cut = [
        slice(None) if size == 1 else slice(*bounds)
        for size, *bounds in zip(channels.shape, starts, limits, strides, strict=True)
    ]
    return compressed(channels[tuple(cut)])


def _slice(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    names = ("start_indices", "limit_indices", "strides")
    return [_cut(x.channels[0], *(eqn.params[name] for name in names))]


def _split(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    parts = [_cut(x.channels[0], *cut) for cut in cuts(eqn, x.shapes[0])]
    if eqn.primitive.name == "unstack":
        parts = [part.squeeze(eqn.params["axis"]) for part in parts]
    return parts


def _rev(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    return [np.flip(x.channels[0], tuple(eqn.params["dimensions"]))]


def _concatenate(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    axis, parts = eqn.params["dimension"], []
    sizes = [max(n) for n in zip(*(part.shape for part in x.channels), strict=True)]
    for part, shape in zip(x.channels, x.shapes, strict=True):
        parts.append(np.broadcast_to(part, [*sizes[:axis], shape[axis], *sizes[axis + 1 :]]))
    return [compressed(np.concatenate(parts, axis))]


def _pad(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    """Padding with zeros leaves channels where they are."""
    (channels, filler), config = x.channels, eqn.params["padding_config"]
    padded = [a for a, sizes in enumerate(config) if any(sizes)]
    if padded and filler.item() != ZERO:
        return _unknown(book, eqn, x)
    for axis in padded:
        low, high, inner = config[axis]
        if channels.shape[axis] == 1:
            continue
        if min(low, high) < 0 or inner:
            channels = fixed_along(book, channels, (axis,))
            continue
        width = [(0, 0)] * channels.ndim
        width[axis] = (low, high)
        channels = np.pad(channels, width, constant_values=ZERO)
    return [channels]


def _reduce(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    """A sum or extremum of elements of one channel, over `axes`."""
    axes = tuple(eqn.params["axes"])
    return [fixed_along(book, x.channels[0], axes).squeeze(axes)]


def _arg(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    return [free(reduced.ndim) for reduced in _reduce(book, eqn, x)]


def _cumulative(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    return [fixed_along(book, x.channels[0], (eqn.params["axis"],))]


def _windows(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    """Pooling: along axes that a window leaves as they are channels may vary."""
    params = eqn.params
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    moved = tuple(
        a
        for a in range(x.channels[0].ndim)
        if any(params[n][a] != 1 for n in names) or any(params["padding"][a])
    )
    return [fixed_along(book, x.channels[0], moved)]


def _dot(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    """A product with something that no channel scales, such as attention's mixture."""
    if all(map(any_in, x.channels)):
        return _unknown(book, eqn, x)
    side = 0 if any_in(x.channels[0]) else 1
    other = len(x.shapes[1 - side])
    numbers = eqn.params["dimension_numbers"]
    return [product_of_axes(book, x.channels[side], other, numbers, side)]


def _gather(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    book.fix(x.channels[1])
    return [gathered(book, eqn, x.channels[0], x.shapes[0])]


def _dynamic_slice(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    (channels, *starts), shape = x.channels, x.shapes[0]
    for start in starts:
        book.fix(start)
    sizes = eqn.params["slice_sizes"]
    cut = tuple(a for a in range(len(shape)) if sizes[a] != shape[a])
    return [fixed_along(book, channels, cut)]


def _dynamic_update(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    (channels, update, *starts), shapes = x.channels, x.shapes
    for start in starts:
        book.fix(start)
    cut = tuple(a for a, size in enumerate(shapes[0]) if shapes[1][a] != size)
    parts = [fixed_along(book, part, cut) for part in (channels, update)]
    return [book.meet(*parts, tie=False)]


def _scatter(book: Book, eqn: Any, x: Operands) -> list[Channels]:
    """Rows written to, or added to, rows of the same channels, or to zeros."""
    channels, indices, update = x.channels
    book.fix(indices)
    numbers, shape = eqn.params["dimension_numbers"], x.shapes[0]
    skipped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = [a for a in range(len(shape)) if a not in skipped]
    pairs = list(zip(windows, numbers.update_window_dims, strict=True))
    parts = [(a, place) for a, place in pairs if shape[a] != x.shapes[2][place]]
    rows = {*range(update.ndim)} - {*numbers.update_window_dims} | {place for _, place in parts}
    update = fixed_along(book, update, tuple(rows))
    channels = fixed_along(book, channels, (*skipped, *(a for a, _ in parts)))
    sizes = [1] * len(shape)
    for axis, place in pairs:
        sizes[axis] = update.shape[place]
    return [book.meet(channels, update.reshape(sizes), tie=False)]


_ELEMENTWISE: dict[str, Rule] = {
    **dict.fromkeys(
        ("neg", "abs", "copy", "copy_p", "stop_gradient", "name", "pvary", "reduce_precision"),
        _same,
    ),
    **dict.fromkeys(("sharding_constraint", "reshard", "optimization_barrier"), _same),
    **dict.fromkeys(("add", "add_any", "sub", "max", "min"), _add),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), _compare),
    **dict.fromkeys(("sign", "is_finite"), _sign),
    "convert_element_type": _convert,
    "mul": _mul,
    "div": _div,
    "select_n": _select,
}
"""Those in which each element of a result is made of the elements at its own place."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _arg),
    **dict.fromkeys(("cumsum", "cummax", "cummin"), _cumulative),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), _windows),
    **dict.fromkeys(("scatter", "scatter-add", "scatter_add"), _scatter),
    **dict.fromkeys(("split", "unstack"), _split),
    "device_put": _same,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "rev": _rev,
    "concatenate": _concatenate,
    "pad": _pad,
    "dot_general": _dot,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
}
