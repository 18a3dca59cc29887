"""From the axes that a site sees of a weight to those of the parameter as it is stored."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Int32

from ._channels import Book, Channels, compressed, varies
from ._mark import Root
from ._weight import BATCH, CONTRACTED, KEPT, STACK, Weight


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """Shape and roles of a parameter, or of the slice that a step of a loop gets.

    `groups` are, for each present axis, the axes of that shape that it is made of.
    """

    shape: tuple[int, ...]
    roles: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]

    def axis_of(self, present: int) -> int:
        """The one stored axis behind a present one."""
        (axis,) = self.groups[present]
        return axis

    def from_present(self, channels: Channels) -> Channels:
        """Channels of the present axes in stored order."""
        sizes: list[int] = []
        for axis, group in enumerate(self.groups):
            wide = varies(channels, (axis,))
            sizes += [self.shape[a] if wide else 1 for a in group]
        axes = [a for group in self.groups for a in group]
        order = sorted(range(len(axes)), key=lambda i: axes[i])
        split = channels.reshape(sizes).transpose(order)
        out = [1] * len(self.shape)
        for i, axis in enumerate(sorted(axes)):
            out[axis] = split.shape[i]
        return compressed(split.reshape(out))

    def to_present(self, channels: Channels) -> Channels:
        """The other way round."""
        axes = [a for group in self.groups for a in group]
        gone = tuple(a for a in range(len(self.shape)) if a not in axes)
        sizes, full = [], []
        for group in self.groups:
            wide = varies(channels, group)
            full += [self.shape[a] if wide else 1 for a in group]
            sizes.append(math.prod(self.shape[a] for a in group) if wide else 1)
        left = sorted(axes)
        moved = channels.squeeze(gone).transpose([left.index(a) for a in axes])
        return np.broadcast_to(moved, full).reshape(sizes)

    def matrix(self, channels: Channels) -> Int32[np.ndarray, "*stack k"]:
        """Stored channels in matrix form `[*stack, k]`; `[k]` if all of a stack have the same."""
        stack = [a for a, role in enumerate(self.roles) if role in (STACK, BATCH)]
        contracted = [a for a, role in enumerate(self.roles) if role == CONTRACTED]
        if not varies(channels, tuple(stack)):
            channels, lead = channels.squeeze(tuple(stack)), []
            left = [a for a in range(len(self.shape)) if a not in stack]
        else:
            lead, left = stack, [*range(len(self.shape))]
        order = [left.index(a) for a in (*lead, *contracted)]
        kept = [i for i in range(len(left)) if i not in order]
        moved = channels.transpose([*order, *kept])
        full = [self.shape[a] for a in (*lead, *contracted)]
        shape = [self.shape[a] for a in lead]
        return np.broadcast_to(moved.reshape(moved.shape[: len(order)]), full).reshape(*shape, -1)

    def new(self, book: Book, op: str, sizes: int) -> tuple[Channels, Channels]:
        """New channels for each column of the weight (row, of a table): stored, and present."""
        own = (CONTRACTED,) if op == "take" else (KEPT, BATCH, STACK)
        if op == "ragged_dot":
            own = (KEPT,)
        present = {a for group in self.groups for a in group}
        shape = tuple(
            size if role in own and a in present else 1
            for a, (size, role) in enumerate(zip(self.shape, self.roles, strict=True))
        )
        made = book.new(shape, sizes)
        return made, self.to_present(made)


def stored_axes(weight: Weight, root: Root, roles: tuple[str, ...]) -> Stored | None:
    """How a weight at a site stands to its parameter; `None` where it is only a part of it."""
    stepped = dict(root.steps)
    left = [a for a in range(len(weight.stored)) if a not in stepped]
    shape = tuple(weight.stored[a] for a in left)
    groups: list[Any] = []
    for size, group in zip(weight.shape, weight.axes, strict=True):
        if math.prod(weight.stored[a] for a in group) != size:
            return None
        groups.append(tuple(left.index(a) for a in group))
    seen = {a for group in groups for a in group}
    if any(size > 1 and a not in seen for a, size in enumerate(shape)):
        return None
    return Stored(shape=shape, roles=tuple(roles[a] for a in left), groups=tuple(groups))
