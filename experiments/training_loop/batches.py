"""Which examples a step takes: a function of the seed and the step, and of nothing else.

There is no iterator whose place a checkpoint would have to hold. `grain`'s `MapDataset` has random
access too, and would do: `Problem.batch` is any function of the step. It is not used because it
brings array_record, cloudpickle and portpicker for what is forty lines here, where all data fits in
memory.
"""

import dataclasses

import numpy as np


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` examples in an epoch, each once.

    From the raw words of a Philox generator, whose stream NumPy keeps from version to version
    (NEP 19), unlike that of `Generator.permutation`. Words that are equal stay in order.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """The examples of each step, in epochs that are shuffled anew; a batch may lie in two."""

    count: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError("There are no examples to train on. Give more data.")

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """For each example of a step (counted from 0): its epoch, and its number in the data."""
        epochs, places = np.divmod(step * self.batch + np.arange(self.batch), self.count)
        chosen = np.empty(self.batch, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = shuffled(self.count, self.seed, int(epoch))[places[here]]
        return epochs, chosen


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenWindows:
    """Windows `[batch, length]` (int32) of one long row of tokens.

    Each epoch cuts the row at another place, so that a token does not always stand at the same
    position of its window.
    """

    tokens: np.ndarray
    length: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens) < 2 * self.length:
            raise ValueError(
                f"The text has {len(self.tokens)} tokens; at least {2 * self.length} are wanted "
                f"for windows of {self.length}. Give more text."
            )

    @property
    def order(self) -> Order:
        # One window less than would fit, so that every cut has as many.
        count = len(self.tokens) // self.length - 1
        return Order(count=count, batch=self.batch, seed=self.seed)

    def __call__(self, step: int) -> np.ndarray:
        epochs, chosen = self.order.at(step)
        cuts = {e: self._cut(int(e)) for e in np.unique(epochs)}
        starts = chosen * self.length + np.array([cuts[e] for e in epochs])
        return self.tokens[starts[:, None] + np.arange(self.length)].astype(np.int32)

    def _cut(self, epoch: int) -> int:
        words = np.random.Philox(key=np.array([self.seed + 1, epoch], np.uint64)).random_raw(1)
        return int(words[0] % self.length)
