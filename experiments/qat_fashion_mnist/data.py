"""Batches of Fashion-MNIST that a seed and a step decide."""

from collections.abc import Iterator

import numpy as np
from fashion_mnist import Data


def batches(data: Data, size: int, steps: int, seed: int) -> Iterator[tuple[np.ndarray, ...]]:
    """`steps` batches: every image once an epoch, mirrored at random; the rest of one is left."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = rng.permutation(len(data.labels))
        rows, order = order[:size], order[size:]
        images = data.images[rows]
        mirrored = rng.integers(2, size=(size, 1, 1, 1)) > 0
        yield np.where(mirrored, images[:, :, ::-1], images), data.labels[rows]
