"""Timings side by side: one process, taking turns, medians."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each round of one side."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the rounds, in seconds."""
        return statistics.median(self.seconds)

    def ratio(self, other: "Timing") -> float:
        """How many times as fast as `other` this side is: the median over rounds of their ratio.

        The two sides of a round ran one after the other, so what slows the machine for a while
        slows both, and leaves their ratio.
        """
        pairs = zip(other.seconds, self.seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def medians(
    sides: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmups: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Times each side once a round, in turn, after `warmups` rounds that do not count.

    A side is called without arguments, and is done when the arrays it returns are. Every second
    round runs in the opposite order, so that no side always follows the same other.

    **Raises:** `ValueError` if there are no sides or no rounds.
    """
    if not sides or rounds < 1:
        raise ValueError(f"{len(sides)} sides in {rounds} rounds; at least one of each is wanted.")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmups + rounds):
        names = list(sides)
        for name in names if turn % 2 == 0 else names[::-1]:
            start = time.perf_counter()
            jax.block_until_ready(sides[name]())
            if turn >= warmups:
                seconds[name].append(time.perf_counter() - start)
        if progress is not None:
            progress(turn + 1, warmups + rounds)
    return {name: Timing(seconds=tuple(values)) for name, values in seconds.items()}
