"""SmoothQuant: peaks of inputs moved into the weights, channel by channel."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..intercept import Peak
from ..qarray import dequantize, quantize_array, Scheme

LEAST = 1e-5
"""No channel is divided by less, and no peak of a weight is taken to be smaller."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Inputs over `s`, weights times `s` (Xiao et al. 2023, arXiv:2211.10438, eq. 4).

    `s_j = max(peak_j ^ alpha / wmax_j ^ (1 - alpha), 1e-5)`, where `peak_j` is the largest |x_j|
    over the calibration tokens and `wmax_j` the largest magnitude in column `j` of all the weights
    that read this input. With `alpha` 0 the columns of the weights peak at 1, with 1 the inputs.

    With `alpha=None` each place has its own: leaving the input as it is and `ratios` values
    between 0 and 1 are candidates, and the one with the least loss is taken.

    The factors go into the parameters that make the inputs. Where there are none that could take
    them, sites are left as they are; with `unfolded`, their inputs are divided at run time.
    """

    alpha: float | None = 0.5
    ratios: int = 9
    unfolded: bool = False
    name: str = dataclasses.field(default="smoothquant", init=False)

    def __post_init__(self) -> None:
        if not (self.alpha is None or 0 <= self.alpha <= 1) or self.ratios < 1:
            raise ValueError(
                "SmoothQuant takes an alpha from 0 to 1, or None and at least one ratio; got "
                f"alpha={self.alpha}, ratios={self.ratios}."
            )

    @property
    def alphas(self) -> tuple[float, ...]:
        """Those that are tried."""
        if self.alpha is not None:
            return (self.alpha,)
        return tuple(i / (self.ratios + 1) for i in range(1, self.ratios + 1))

    @property
    def searches(self) -> bool:
        """Whether there is more than one candidate, so that a loss is needed."""
        return self.alpha is None

    @property
    def observers(self) -> tuple[Peak]:
        return (Peak(),)

    def candidates(
        self,
        peak: Float[Array, "*stack k"],
        weights: Sequence[Float[Array, "*stack _ k"]],
    ) -> Float[Array, "*stack candidates k"]:
        """The scales of each alpha; the identity first, where one is to be chosen."""
        found = [scales(peak, weights, alpha) for alpha in self.alphas]
        if self.searches:
            found.insert(0, jnp.ones_like(found[0]))
        return jnp.stack(found, axis=-2)


def scales(
    peak: Float[Array, "*stack k"],
    weights: Sequence[Float[Array, "*stack _ k"]],
    alpha: float,
) -> Float[Array, "*stack k"]:
    """What the inputs are divided by and the weights multiplied with.

    A channel whose scale is not finite stays as it is, and so does one whose inputs were all 0:
    other data may drive it.
    """
    widest = functools.reduce(
        jnp.maximum, (jnp.abs(w.astype(jnp.float32)).max(axis=-2) for w in weights)
    )
    s = peak.astype(jnp.float32) ** alpha / jnp.maximum(widest, LEAST) ** (1 - alpha)
    s = jnp.maximum(s, LEAST)
    return jnp.where(jnp.isfinite(s) & (peak > 0), s, 1.0)


def smoothed_losses(
    candidates: Float[Array, "candidates k"],
    weights: Sequence[Float[Array, "_ k"]],
    x: Float[Array, "tokens k"],
    schemes: Sequence[Scheme],
    activations: Scheme,
    *,
    static_peak: Float[Array, " k"] | None = None,
) -> Float[Array, " candidates"]:
    """The squared error of the weights' outputs on sampled inputs, both sides rounded.

    With `static_peak` the range of the activations is the one that calibration gave, and not that
    of `x`: a row with these peaks is rounded along with the others, and left out of the sums.
    """
    return _smoothed_losses(candidates, tuple(weights), x, static_peak, tuple(schemes), activations)


@functools.partial(jax.jit, static_argnames=("schemes", "activations"))
def _smoothed_losses(
    candidates: Any,
    weights: Any,
    x: Any,
    static_peak: Any,
    schemes: tuple[Scheme, ...],
    activations: Scheme,
) -> Any:
    x = x.astype(jnp.float32)
    rows = x if static_peak is None else jnp.concatenate([x, static_peak[None].astype(x.dtype)])

    def loss(s: Any) -> Any:
        held = dequantize(quantize_array(rows / s[None], activations))[: len(x)]
        total = jnp.float32(0)
        for w, scheme in zip(weights, schemes, strict=True):
            w = w.astype(jnp.float32)
            scaled = dequantize(quantize_array(w * s[None], scheme))
            off = _product(held, scaled) - _product(x, w)
            total = total + jnp.square(off).sum()
        return total

    return lax.map(loss, candidates)


def _product(x: Any, w: Any) -> Any:
    return jnp.einsum("tk,nk->tn", x, w, precision=lax.Precision.HIGHEST)
