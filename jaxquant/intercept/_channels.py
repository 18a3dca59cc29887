"""Channels: what each element of a value is proportional to, while others are held.

A value's channels are an int32 array that broadcasts to its shape, of length 1 on axes along which
nothing varies. An entry is the number of a channel, or says that the element does not depend on
any of them, or that it is zero.
"""

import math

import numpy as np
from jaxtyping import Int32

from ..qarray._reshape import matching_axes

FREE = -1
"""An element that stays what it is when channels are scaled."""
ZERO = -2
"""An element that is zero, and so is a multiple of whatever it is added to."""

Channels = Int32[np.ndarray, "..."]


class Book:
    """Channels by number: which must be scaled alike, and which must not be scaled at all.

    Channels are *tied* where elements of both are added up, and *fixed* where an element is used
    otherwise than in proportion. A fixed channel counts as `FREE` from then on.

    Channels of experts are the same for all of these, unless `sizes` still holds at the end: the
    value (by its number) that deals rows out to experts, as long as nothing but elementwise
    operations came in between.
    """

    def __init__(self) -> None:
        self._count = 0
        # Room for more than there are, so that a large model's channels are not copied each time.
        self._parent = np.zeros(0, np.int32)
        self._fixed = np.zeros(0, bool)
        self._sizes = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return self._count

    def new(self, shape: tuple[int, ...], sizes: int = -1) -> Channels:
        """As many new channels as `shape` holds."""
        start, self._count = self._count, self._count + math.prod(shape)
        if self._count > len(self._parent):
            room = 2 * self._count - len(self._parent)
            self._parent = np.concatenate([self._parent, np.zeros(room, np.int32)])
            self._fixed = np.concatenate([self._fixed, np.zeros(room, bool)])
            self._sizes = np.concatenate([self._sizes, np.zeros(room, np.int32)])
        made = np.arange(start, self._count, dtype=np.int32)
        self._parent[start : self._count] = made
        self._sizes[start : self._count] = sizes
        return made.reshape(shape)

    def resolve(self, channels: Channels) -> Channels:
        """One number for all that are tied, `FREE` for those that are fixed."""
        real = channels >= 0
        if not real.any():
            return channels
        out = channels.copy()
        found = self._find(channels[real])
        out[real] = np.where(self._fixed[found], np.int32(FREE), found)
        return out

    def sizes(self, channels: Channels) -> Int32[np.ndarray, " n"]:
        """What deals out the rows of each channel that is not fixed, or -1."""
        return self._sizes[self._find(channels[channels >= 0])]

    def fix(self, channels: Channels) -> None:
        """These must not be scaled."""
        self._fixed[self._find(channels[channels >= 0])] = True

    def share(self, channels: Channels) -> None:
        """Experts must scale these alike."""
        self._sizes[self._find(channels[channels >= 0])] = -1

    def tie(self, a: Int32[np.ndarray, " n"], b: Int32[np.ndarray, " n"]) -> None:
        """Each of `a` must be scaled as its partner in `b`; none may be fixed."""
        pairs = np.unique(np.stack([self._find(a), self._find(b)]), axis=1)
        pairs = pairs[:, pairs[0] != pairs[1]]
        into, gone = pairs
        alone = len(np.unique(gone)) == len(gone) and not np.isin(gone, into).any()
        if alone:
            self._merge(into, gone)
            return
        for first, second in pairs.T:
            ends = self._find(np.asarray([first, second], np.int32))
            if ends[0] != ends[1]:
                self._merge(ends[:1], ends[1:])

    def meet(self, a: Channels, b: Channels, *, tie: bool) -> Channels:
        """The channels of a sum, or of what is taken from either; zeros go along with anything.

        Where the two differ they are tied if `tie`, else both are fixed.
        """
        a, b = np.broadcast_arrays(self.resolve(a), self.resolve(b))
        clash = (a != b) & (a != ZERO) & (b != ZERO)
        both = clash & (a >= 0) & (b >= 0)
        if tie and both.any():
            self.tie(a[both], b[both])
            clash = clash & ~both
        self.fix(a[clash])
        self.fix(b[clash])
        return self.resolve(np.where(a == ZERO, b, a))

    def _merge(self, into: Int32[np.ndarray, " n"], gone: Int32[np.ndarray, " n"]) -> None:
        differ = self._sizes[into] != self._sizes[gone]
        self._parent[gone] = into
        self._sizes[into[differ]] = -1

    def _find(self, channels: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        found = channels
        while True:
            up = self._parent[found]
            if np.array_equal(up, found):
                break
            found = up
        self._parent[channels] = found
        return found


def free(ndim: int, entry: int = FREE) -> Channels:
    """The channels of a value all of whose elements are alike."""
    return np.full((1,) * ndim, entry, np.int32)


def any_in(channels: Channels) -> bool:
    """Whether an element depends on any channel."""
    return bool((channels >= 0).any())


def varies(channels: Channels, axes: tuple[int, ...]) -> bool:
    """Whether elements differ in their channel along any of `axes`."""
    return any(channels.shape[a] > 1 for a in axes)


def compressed(channels: Channels) -> Channels:
    """Of length 1 on each axis along which nothing varies."""
    for axis, size in enumerate(channels.shape):
        if size > 1:
            first = channels.take([0], axis)
            if (channels == first).all():
                channels = first
    return channels


def reshaped(channels: Channels, old: tuple[int, ...], new: tuple[int, ...]) -> Channels:
    """The channels of a value of shape `old` that is reshaped to `new`."""
    full, sizes = list(channels.shape), [1] * len(new)
    for before, after in matching_axes(old, new):
        if varies(channels, before):
            for a in before:
                full[a] = old[a]
            for a in after:
                sizes[a] = new[a]
    return compressed(np.broadcast_to(channels, full).reshape(sizes))
