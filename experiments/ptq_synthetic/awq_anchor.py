"""AWQ on channels of different size, against published figures."""

from typing import Any

import channels
import jax.numpy as jnp
import numpy as np
from cells import cell

from jaxquant.algorithms import AWQ, choose, clipped, ClipSearch, Duo, rounded_at, scaling_losses
from jaxquant.numerics import INT4, MinMax, UINT3, UINT4
from jaxquant.qarray import PER_CHANNEL, Scheme, Tile

SEEDS = range(7)
GROUP = 128
G128 = Tile(contracted=GROUP)
W4 = Scheme(values=UINT4, tile=G128, range=MinMax(), zero_point=UINT4)
W3 = Scheme(values=UINT3, tile=G128, range=MinMax(), zero_point=UINT3)
W4_ROW = Scheme(values=INT4, tile=PER_CHANNEL)

PLAIN = AWQ(ratios=20, duo=Duo.OFF)
"""As in the paper, but for clipping, which the figures are without."""


def rounded(data: channels.Data, scheme: Scheme) -> float:
    ones = jnp.ones(data.w.shape[1])
    return channels.weight_error(data, np.asarray(rounded_at(jnp.asarray(data.w), ones, scheme)))


def scaled(
    data: channels.Data,
    scheme: Scheme,
    how: AWQ = PLAIN,
    clip: ClipSearch | None = None,
    *,
    peaks: bool = False,
) -> float:
    """The error with the scales that the calibration tokens choose."""
    w, gram = jnp.asarray(data.w), data.gram
    size = np.abs(data.train)
    statistic = jnp.asarray(size.max(0) if peaks else size.mean(0))
    candidates = how.candidates(statistic, [w], group=scheme.tile.contracted)
    s = choose(candidates, scaling_losses(candidates, [w], gram, [scheme])).scale
    if clip is not None:
        large, ones = w * s[None], jnp.ones_like(s)
        limits = clip.limits(large, gram / s[:, None] / s[None], scheme)
        made = rounded_at(clipped(large, limits), ones, scheme) / s[None]
    else:
        made = rounded_at(w, s, scheme)
    return channels.weight_error(data, np.asarray(made))


# method, case -> how it is measured, and the published figure if there is one.
CELLS: dict[tuple[str, str], tuple[Any, float | None]] = {
    ("rounding", "4b g128"): (lambda d: rounded(d, W4), 0.01002),
    ("AWQ, 20 ratios", "4b g128"): (lambda d: scaled(d, W4), 0.00566),
    ("AWQ, 6 ratios", "4b g128"): (
        lambda d: scaled(d, W4, AWQ(ratios=6, duo=Duo.OFF)),
        0.00593,
    ),
    ("AWQ of peaks, 20 ratios", "4b g128"): (lambda d: scaled(d, W4, peaks=True), 0.00568),
    ("AWQ, duo", "4b g128"): (lambda d: scaled(d, W4, AWQ(duo=Duo.ON)), 0.00563),
    ("AWQ, duo both", "4b g128"): (lambda d: scaled(d, W4, AWQ()), None),
    ("AWQ, duo both, clip search", "4b g128"): (
        lambda d: scaled(d, W4, AWQ(), ClipSearch()),
        None,
    ),
    ("rounding", "4b, a scale a row"): (lambda d: rounded(d, W4_ROW), 0.01808),
    ("AWQ, 6 ratios", "4b, a scale a row"): (
        lambda d: scaled(d, W4_ROW, AWQ(ratios=6, duo=Duo.OFF)),
        0.01196,
    ),
    ("rounding", "3b g128"): (lambda d: rounded(d, W3), 0.0444),
    ("AWQ, 20 ratios", "3b g128"): (lambda d: scaled(d, W3), 0.0259),
    ("AWQ, duo both, clip search", "3b g128"): (
        lambda d: scaled(d, W3, AWQ(), ClipSearch()),
        None,
    ),
}


def rows() -> list[dict[str, Any]]:
    """Each cell: the median over the seeds, the published figure and our ratio to it."""
    drawn = [channels.draw(seed) for seed in SEEDS]
    found = []
    for (method, case), (measure, anchor) in CELLS.items():
        values = [measure(data) for data in drawn]
        found.append(cell(method, case, values, anchor))
    return found
