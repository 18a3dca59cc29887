"""How the sites of one rule are trained: a value, nested by operand."""

import dataclasses

from ..qarray import PER_TENSOR, Scheme
from ._estimators import Delayed, Estimator, MovingAverage, PACT, StraightThrough
from ._way_back import WayBack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """The estimators of weights and of activations at a site, and how gradients are held.

    `gradients` is the scheme to which the gradient that arrives at a site is rounded, at random,
    before both products of the way back; `None` leaves it as it is. With `way_back` these two are
    products of codes (low-precision training), and have a scheme of gradients of their own.
    """

    weights: Estimator = StraightThrough()
    activations: Estimator = StraightThrough()
    gradients: Scheme | None = None
    way_back: WayBack | None = None

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
        if self.way_back is not None:
            return self._check_way_back(weights, activations)
        if any(isinstance(each, Delayed) for each in (self.weights, self.activations)):
            return "delayed scales are for low-precision training; give it a way_back as well"
        return None

    @property
    def held(self) -> tuple[str, ...]:
        """The names of what a site holds from step to step, beside ranges of its inputs."""
        moving = isinstance(self.activations, Delayed)
        back = () if self.way_back is None else self.way_back.held
        return (*back, "seen") if back or moving else ()

    def __repr__(self) -> str:
        # What is not set is left out, so that fingerprints of plans without it hold.
        fields = [f.name for f in dataclasses.fields(self)]
        shown = [name for name in fields if name != "way_back" or self.way_back is not None]
        return f"Training({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def _check_way_back(self, weights: Scheme, activations: Scheme | None) -> str | None:
        assert self.way_back is not None
        if self.gradients is not None:
            return "way_back has a scheme of gradients; leave out the one beside it"
        for estimator in (self.weights, self.activations):
            if not isinstance(estimator, Delayed) and estimator != StraightThrough():
                return f"products of codes pass gradients on as they are, and not by {estimator}"
        return self.way_back.check(weights, activations)


def _unfit(estimator: Estimator, scheme: Scheme) -> str | None:
    if not estimator.learned or isinstance(estimator, MovingAverage):
        return None
    if isinstance(estimator, Delayed) and scheme.tile != PER_TENSOR:
        return "a delayed scale is one in all; give it PER_TENSOR"
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
