"""Gradients through quantization: estimators, learned scales, products of codes."""

from ._delayed import (
    first_delayed as first_delayed,
    moved_scale as moved_scale,
    peaks_by_tile as peaks_by_tile,
)
from ._estimators import (
    Delayed as Delayed,
    Estimator as Estimator,
    LSQ as LSQ,
    LSQPlus as LSQPlus,
    MovingAverage as MovingAverage,
    PACT as PACT,
    Start as Start,
    StraightThrough as StraightThrough,
)
from ._gradients import rounded_gradient as rounded_gradient
from ._lora import LoRA as LoRA
from ._rounding import (
    codes_of as codes_of,
    first_range as first_range,
    held_scale as held_scale,
    Learned as Learned,
    range_from as range_from,
    rounded as rounded,
    Rounding as Rounding,
)
from ._settings import Training as Training
from ._straight import straight_through as straight_through
from ._way_back import Dot as Dot, in_codes as in_codes, RESIDUAL as RESIDUAL, WayBack as WayBack
