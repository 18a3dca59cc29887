"""How the columns of a weight are cut into runs, for an algorithm that takes them in turn."""

import dataclasses

import numpy as np

LEAF = 16
"""Columns that are rounded one by one before what they leave is multiplied as a matrix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panels:
    """Slots for `columns` columns in groups of `width`, and runs of them within runs.

    `sizes` are the lengths of nested runs, the longest first; each divides the one before, and the
    first `slots`. A group begins at every multiple of `group` slots. Slots past its `width` columns
    are empty; the last group may have fewer columns than the others.
    """

    columns: int
    width: int
    group: int
    sizes: tuple[int, ...]

    @property
    def groups(self) -> int:
        return -(-self.columns // self.width)

    @property
    def slots(self) -> int:
        return self.groups * self.group

    @property
    def last(self) -> int:
        """The columns of the last group."""
        return self.columns - (self.groups - 1) * self.width

    def places(self) -> np.ndarray:
        """The column in each slot, -1 in empty ones."""
        group, within = np.divmod(np.arange(self.slots), self.group)
        column = group * self.width + within
        return np.where((within < self.width) & (column < self.columns), column, -1)


def panels(columns: int, width: int, block: int) -> Panels:
    """Runs of about `block` columns, of leaves of them, and of groups of `width`.

    Groups longer than `block` hold blocks, and blocks hold shorter groups; a lone group is
    cut in blocks. Few slots are empty, none where 16, or a number a little below it, divides
    `width`.
    """
    longest = min(LEAF, width, block)
    leaf = min(range(longest, longest // 2, -1), key=lambda size: -(-width // size) * size)
    if width <= block:
        group, count = -(-width // leaf) * leaf, -(-columns // width)
        several = [m for m in range(1, count + 1) if count % m == 0 and 2 * m * group <= 3 * block]
        sizes = (max(several, default=1) * group, group, leaf)
    else:
        least = -(-width // block)
        cuts = [-(-width // (pieces * leaf)) * leaf for pieces in range(least, 2 * least + 1)]
        run = min(cuts, key=lambda size: -(-width // size) * size)
        group = -(-width // run) * run
        # What a lone group begins with is mended for nothing: it may as well be several blocks.
        sizes = (group, run, leaf) if width < columns else (run, leaf)
    return Panels(columns=columns, width=width, group=group, sizes=tuple(dict.fromkeys(sizes)))
