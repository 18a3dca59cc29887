"""Every observer of what sites multiply their weights with: for `jaxquant.observe(observers=)`."""

from ._histogram import Histogram as Histogram
from ._observers import (
    Count as Count,
    Extremes as Extremes,
    Gram as Gram,
    mean_magnitude as mean_magnitude,
    Moments as Moments,
    nonfinite as nonfinite,
    Peak as Peak,
)
