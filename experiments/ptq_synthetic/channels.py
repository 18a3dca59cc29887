"""Inputs whose channels differ in size, as those of language models do, and a weight to read them.

The published figures come with "log-normal channel scales + 4 outliers" and no generator. Spread,
outliers and sizes here were chosen such that rows which no algorithm touches (rounding, and plain
W8A8, per token and per tensor) meet their figures. The other rows were seen meanwhile, so that they
say less than rows of a generator that was fixed beforehand.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

SPREAD = 1.0
"""Standard deviation of the logarithm of a channel's size."""
OUTLIERS, LARGER = 4, 13.0
"""So many channels are so many times larger again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """A weight `[out, in]`, tokens `[tokens, in]` to calibrate with, and others to measure on."""

    w: np.ndarray
    train: np.ndarray
    test: np.ndarray

    @property
    def gram(self) -> jnp.ndarray:
        return jnp.asarray(self.train.T @ self.train)


def draw(seed: int, *, out: int = 256, channels: int = 512, tokens: int = 2048) -> Data:
    rng = np.random.Generator(np.random.PCG64(seed))
    sizes = np.exp(SPREAD * rng.standard_normal(channels))
    sizes[rng.choice(channels, OUTLIERS, replace=False)] *= LARGER
    inputs = rng.standard_normal((2, tokens, channels)) * sizes
    w = rng.standard_normal((out, channels)) / np.sqrt(channels)
    train, test = inputs.astype(np.float32)
    return Data(w=w.astype(np.float32), train=train, test=test)


def output_error(data: Data, off: np.ndarray) -> float:
    """`||off||^2 / ||test w^T||^2` for what outputs of the test tokens are off by, in float64."""
    y = data.test.astype(np.float64) @ data.w.astype(np.float64).T
    return float((off.astype(np.float64) ** 2).sum() / (y**2).sum())


def weight_error(data: Data, w: np.ndarray) -> float:
    """The same where `w` stands for the weight."""
    moved = np.asarray(w).astype(np.float64) - data.w
    return output_error(data, data.test.astype(np.float64) @ moved.T)
