"""How the sites of one rule are trained: a value, nested by operand."""

import dataclasses

from ..qarray import Scheme
from ._estimators import Estimator, MovingAverage, PACT, StraightThrough


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """The estimators of weights and of activations at a site, and how gradients are held.

    `gradients` is the scheme to which the gradient that arrives at a site is rounded, at random,
    before both products of the way back; `None` leaves it as it is.
    """

    weights: Estimator = StraightThrough()
    activations: Estimator = StraightThrough()
    gradients: Scheme | None = None

    def check(self, weights: Scheme, activations: Scheme | None, static: bool) -> str | None:
        """Why these estimators do not fit the schemes of a rule, or `None`."""
        if isinstance(self.weights, (PACT, MovingAverage)):
            return f"{self.weights} is for activations, and it is to round weights"
        if self.activations.learned and (activations is None or not static):
            return (
                f"{self.activations} learns ranges of activations, which are then fixed; give the "
                "rule activations and static=True"
            )
        for what, estimator, scheme in (
            ("weights", self.weights, weights),
            ("activations", self.activations, activations),
        ):
            reason = None if scheme is None else _unfit(estimator, scheme)
            if reason is not None:
                return f"the {what} ({scheme}) do not fit {estimator}: {reason}"
        return None


def _unfit(estimator: Estimator, scheme: Scheme) -> str | None:
    if not estimator.learned or isinstance(estimator, MovingAverage):
        return None
    if isinstance(scheme.scale, Scheme) or scheme.centered:
        return "scales that are learned are plain, one a tile"
    if scheme.scale.bits < 16:
        return "scales of fewer than 16 bits would not move; hold them in FLOAT32 or BFLOAT16"
    offset = "offset" in estimator.learned
    if offset and scheme.zero_point is None:
        return "it learns an offset, and the scheme has no zero point"
    if not offset and scheme.zero_point is not None:
        return "it learns no offset; LSQPlus does"
    return None
