"""Layouts: in which order, and how tightly, the codes of a QArray lie in memory."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Static facts about stored codes that hold whatever stack axes are added or taken away.

    `order[i]` is the logical axis, counted from the end, that lies `i`-th among the last
    `len(order)` stored axes; axes before them lie in their logical order. `None`: all do.
    `packed` is the number of codes in one block of `numerics.pack` along the last stored axis;
    `None`: one code an element. `wide` holds sub-byte integers one a byte, as `int8`: a CPU spends
    that byte on an `int4` too, and converts from `int8` several times faster.
    """

    order: tuple[int, ...] | None = None
    packed: int | None = None
    wide: bool = False

    def __post_init__(self) -> None:
        if self.wide and self.packed is not None:
            raise ValueError("A layout is packed (several codes a byte) or wide (one), not both.")

    def permutation(self, ndim: int) -> tuple[int, ...]:
        """For each stored axis, the logical axis that it holds."""
        if self.order is None:
            return tuple(range(ndim))
        if ndim < len(self.order):
            raise ValueError(
                f"A layout of order {self.order} needs at least {len(self.order)} axes, but the "
                f"codes have {ndim}. Remove stack axes only from the front, or go back to the "
                "canonical layout first (`relayout`)."
            )
        lead = ndim - len(self.order)
        return tuple(range(lead)) + tuple(a + ndim for a in self.order)


CANONICAL = Layout()
"""Stored as the model stores the weight, one code an element. What checkpoints hold."""


def order_of(permutation: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shortest `Layout.order` for a full stored-to-logical permutation."""
    ndim = len(permutation)
    lead = 0
    while lead < ndim and permutation[lead] == lead:
        lead += 1
    return tuple(a - ndim for a in permutation[lead:]) or None


def inverse(permutation: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes `permutation`."""
    return tuple(permutation.index(i) for i in range(len(permutation)))
