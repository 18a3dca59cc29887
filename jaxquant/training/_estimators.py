"""Estimators: what stands in for the derivative of rounding. Values; one equation each.

Rounding has derivative 0 almost everywhere. An estimator says instead how a gradient that arrives
at `v_hat`, what the codes of `v` stand for, goes on to `v` and to what is learned beside it. With
`u = v / s` (plus the zero point), `Q` the nearest value between the ends `-Qn` and `Qp`:

| | dv_hat/dv | learned |
|---|---|---|
| `StraightThrough()` | 1 | |
| `StraightThrough(clipped=True)` | 1 for -Qn <= u <= Qp, else 0 | |
| `LSQ()` | 1 for -Qn < u < Qp, else 0 | scale: Q(u) - u inside, -Qn or Qp outside |
| `LSQPlus()` | the same | offset too: 0 inside, 1 outside |
| `PACT()` | 1 for v < alpha, else 0 | alpha: 0 inside, 1 where v >= alpha |
| `MovingAverage()` | as clipped | |
| `Delayed()` | 1 | |

Sources: Bengio et al. 2013 (arXiv:1308.3432); Esser et al., "Learned Step Size Quantization", ICLR
2020, equations 3 and 5; Bhalgat et al., "LSQ+", CVPR 2020 workshops, equations 4 to 6; Choi et al.,
"PACT" (arXiv:1805.06085), equation 3.
"""

import dataclasses
import enum
import math
from typing import Any, ClassVar

from ..numerics import Format


@dataclasses.dataclass(frozen=True, kw_only=True)
class StraightThrough:
    """The gradient goes through as it is; where `clipped`, not to what lies past the ends.

    Scales come from what is rounded, and are constants to the gradient.
    """

    clipped: bool = False
    name: ClassVar[str] = "straight_through"
    learned: ClassVar[tuple[str, ...]] = ()


class Start(enum.Enum):
    """Where learned scales start."""

    MEAN = "mean"
    """`2 mean|v| / sqrt(Qp)`, as the paper has it. Of 8 bits that is a gap several times as wide as
    rounding's, of 4 bits still a wider one: for long training."""
    RANGE = "range"
    """By the range rule of the scheme, where rounding after training is: for fine-tuning. Of
    activations, the largest magnitude of the batches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSQ:
    """Learned scales. With `scaled` their gradient is multiplied by `1 / sqrt(N Qp)`, where `N` are
    the weights, or the features, that share the scale."""

    scaled: bool = True
    start: Start = Start.MEAN
    name: ClassVar[str] = "lsq"
    learned: ClassVar[tuple[str, ...]] = ("scale",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSQPlus:
    """Learned scales and offsets, `v_hat = s Q((v - offset) / s) + offset`: for schemes with zero
    points, which are `-offset / s`. Those of weights start by the range rule of the scheme."""

    scaled: bool = True
    name: ClassVar[str] = "lsq_plus"
    learned: ClassVar[tuple[str, ...]] = ("scale", "offset")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PACT:
    """A learned end `alpha` of activations that are not negative: the scale is `alpha / Qp`.

    The paper adds `alpha ** 2` to the loss, as weight decay does.
    """

    name: ClassVar[str] = "pact"
    learned: ClassVar[tuple[str, ...]] = ("alpha",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingAverage:
    """Least and largest value of activations, averaged over steps: `decay` of what it was stays.

    Ranges move where a call hands back what it wrote, and are constants to the gradient, which is
    0 past them (Jacob et al., arXiv:1712.05877, section 3.1).
    """

    decay: float = 0.99
    name: ClassVar[str] = "moving_average"
    learned: ClassVar[tuple[str, ...]] = ("low", "high")

    def moved(self, old: Any, new: Any) -> Any:
        """The range after one more step, from that before and that of the step."""
        return self.decay * old + (1.0 - self.decay) * new

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is at least 0 and less than 1, not {self.decay}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delayed:
    """A scale from the largest magnitudes of the last steps: known before what it rounds is.

    The scale is `2 ** margin` times the largest (with `latest` the last) of `history` magnitudes,
    over the end of the format. It is moved between steps (`jaxquant.update_scales`); a magnitude of
    zero, infinity or NaN leaves it where it was. Gradients pass as they are (Transformer Engine's
    `DelayedScaling`, whose defaults these are).
    """

    history: int = 1024
    margin: int = 0
    latest: bool = False
    name: ClassVar[str] = "delayed"
    learned: ClassVar[tuple[str, ...]] = ("scale", "peaks")

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"history is a number of steps, at least 1, not {self.history}.")


Estimator = StraightThrough | LSQ | LSQPlus | PACT | MovingAverage | Delayed
"""`learned` are names of arrays, a tile an entry, that are trained beside what is rounded."""


def gradient_scale(estimator: Estimator, count: int, format: Format) -> float:
    """By what the gradient of a learned scale is multiplied; `count` values share it."""
    if not getattr(estimator, "scaled", False):
        return 1.0
    return 1.0 / math.sqrt(max(1, count) * max(1.0, format.highest))
