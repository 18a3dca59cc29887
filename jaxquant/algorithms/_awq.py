"""AWQ: input channels scaled up before their weights are rounded, and down again afterwards."""

import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ..intercept import Gram, Moments
from ..qarray import dequantize, quantize_array, Scheme
from ._clip_search import row_errors

LEAST = 1e-4
"""No channel is scaled by less, before scales are brought around 1."""


class Duo(enum.Enum):
    """Whether candidates know the weights, or the inputs alone."""

    OFF = "off"
    """`mean|x| ^ r` (the paper, and llm-awq)."""
    ON = "on"
    """`mean|x| ^ r / mean|w| ^ (1 - r)` (AutoAWQ's `duo_scaling`), and the identity."""
    BOTH = "both"
    """Half of the ratios one way, half the other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ:
    """Activation-aware scales (Lin et al. 2024, arXiv:2306.00978).

    The weights `w_i` that read one input are rounded as `round(w_i s) / s`, with one `s` for all of
    them, and 1/s goes into what makes the input. `s` is the candidate with the least loss, which is
    the squared error of a block's output, or else of the weights' own outputs (`scaling_losses`).

    Candidates are powers `r` of the mean magnitude of each input channel, `ratios` in all, from 0
    to 1 with both ends, divided by `sqrt(max s * min s)`. The first is always the identity: by the
    loss that chose it, no result is worse than plain rounding. (AutoAWQ's `duo_scaling` lacks it.)

    The paper narrows the ranges of weight groups afterwards: `algorithm=ClipSearch()` in the rules
    of all but queries and keys, or any other algorithm.
    """

    ratios: int = 20
    duo: Duo = Duo.BOTH
    name: str = dataclasses.field(default="awq", init=False)

    def __post_init__(self) -> None:
        least = {Duo.OFF: 2, Duo.ON: 3, Duo.BOTH: 4}[self.duo]
        if self.ratios < least:
            raise ValueError(
                f"AWQ with duo={self.duo.name} compares at least {least} candidates, of which one "
                f"is the identity; got ratios={self.ratios}."
            )

    @property
    def observers(self) -> tuple[Moments, Gram]:
        """Mean magnitudes for the candidates; the Gram matrix for losses and clipping."""
        return Moments(), Gram()

    @property
    def exponents(self) -> tuple[tuple[float, bool], ...]:
        """The ratio of each candidate, and whether it divides by the weights' mean magnitude."""
        match self.duo:
            case Duo.OFF:
                plain, divided = self.ratios, 0
            case Duo.ON:
                plain, divided = 1, self.ratios - 1
            case Duo.BOTH:
                plain, divided = self.ratios - self.ratios // 2, self.ratios // 2
        one = [(r, False) for r in np.linspace(0, 1, plain).tolist()]
        return (*one, *((r, True) for r in np.linspace(0, 1, divided).tolist()))

    def candidates(
        self,
        mean_abs: Float[Array, "*stack k"],
        weights: Sequence[Float[Array, "*stack _ k"]],
        *,
        group: int | None = None,
    ) -> Float[Array, "*stack candidates k"]:
        """All scales to try, the identity first.

        `mean_abs` is the mean of |x| over tokens, not its peak (`intercept.mean_magnitude`).
        `group` is how many inputs share a scale of the weights, `None` for all: their mean
        magnitude is taken in units of the group's peak. Channels whose scale is not finite stay as
        they are.
        """
        mean_abs = mean_abs.astype(jnp.float32)
        size = weight_size(weights, group) if self.duo is not Duo.OFF else None
        found = []
        for ratio, divided in self.exponents:
            s = mean_abs**ratio
            if divided:
                assert size is not None
                s = s / (size ** (1 - ratio) + LEAST)
            found.append(_around_one(s))
        return jnp.stack(found, axis=-2)


def weight_size(
    weights: Sequence[Float[Array, "*stack _ k"]], group: int | None
) -> Float[Array, "*stack k"]:
    """Of each input channel the mean of |w| over the group's peak, over the rows of all weights."""
    total, rows = jnp.float32(0), 0
    for w in weights:
        size = jnp.abs(w.astype(jnp.float32))
        k = size.shape[-1]
        width = group or k
        # Zeros fill up a short last group.
        whole = jnp.pad(size, [(0, 0)] * (size.ndim - 1) + [(0, -k % width)])
        cut = whole.reshape(*size.shape[:-1], -1, width)
        cut = cut / (cut.max(axis=-1, keepdims=True) + np.float32(1e-6))
        total = total + cut.reshape(whole.shape)[..., :k].sum(axis=-2)
        rows += size.shape[-2]
    return total / np.float32(rows)


def _around_one(s: Float[Array, "*stack k"]) -> Float[Array, "*stack k"]:
    """`s / sqrt(max s * min s)`, in which channels that are not finite count as 1."""
    s = jnp.maximum(jnp.where(jnp.isfinite(s), s, 1.0), LEAST)
    # A root of each, since their product may overflow.
    middle = jnp.sqrt(s.max(axis=-1, keepdims=True)) * jnp.sqrt(s.min(axis=-1, keepdims=True))
    s = s / middle
    return jnp.where(jnp.isfinite(s) & (s > 0), s, 1.0)


def rounded_at(
    w: Float[Array, "*stack n k"], s: Float[Array, "*stack k"], scheme: Scheme
) -> Float[Array, "*stack n k"]:
    """`round(w s) / s`: what a weight with scaled inputs stands for."""
    s = s[..., None, :]
    q = quantize_array(
        w.astype(jnp.float32) * s, scheme, contracted=(-1,), stack=tuple(range(w.ndim - 2))
    )
    return dequantize(q) / s


def scaling_losses(
    candidates: Float[Array, "*stack candidates k"],
    weights: Sequence[Float[Array, "*stack _ k"]],
    gram: Float[Array, "*stack k k"],
    schemes: Sequence[Scheme],
) -> Float[Array, "*stack candidates"]:
    """The error of the weights' own outputs for each candidate: `sum_i tr(D_i G D_i^T)`.

    `D_i = round(w_i s) / s - w_i`, and `G = x^T x`: squared errors, summed over tokens and outputs,
    without a forward pass. Compiled once for all candidates.
    """
    return _scaling_losses(candidates, tuple(weights), gram, tuple(schemes))


@functools.partial(jax.jit, static_argnames="schemes")
def _scaling_losses(candidates: Any, weights: Any, gram: Any, schemes: tuple[Scheme, ...]) -> Any:
    def loss(s: Any) -> Any:
        total = jnp.float32(0)
        for w, scheme in zip(weights, schemes, strict=True):
            d = rounded_at(w, s, scheme) - w.astype(jnp.float32)
            total = total + row_errors(d, gram.astype(jnp.float32)).sum(axis=-1)
        return total

    return jnp.moveaxis(lax.map(loss, jnp.moveaxis(candidates, -2, 0)), 0, -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search chose: the scales, which candidate they were, and the loss of each."""

    scale: Float[Array, "*stack k"]
    index: Int[Array, "*stack"]
    losses: Float[Array, "*stack candidates"]


def choose(
    candidates: Float[Array, "*stack candidates k"], losses: Float[Array, "*stack candidates"]
) -> Found:
    """The candidate with the least loss, of equals the first; never one whose loss is NaN."""
    losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
    index = jnp.argmin(losses, axis=-1)
    scale = jnp.take_along_axis(candidates, index[..., None, None], axis=-2)[..., 0, :]
    return Found(scale=scale, index=index, losses=losses)
