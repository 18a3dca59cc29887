"""SmoothQuant W8A8 on channels of different size, against published figures."""

from typing import Any

import channels
import jax.numpy as jnp
import numpy as np
from cells import cell

from jaxquant.algorithms import choose, smoothed_losses, SmoothQuant
from jaxquant.numerics import INT8
from jaxquant.qarray import dequantize, PER_CHANNEL, PER_TENSOR, quantize_array, Scheme

SEEDS = range(7)
W8 = Scheme(values=INT8, tile=PER_CHANNEL)
ACTIVATIONS = {"per token": W8, "per tensor": Scheme(values=INT8, tile=PER_TENSOR)}
SEARCHED = SmoothQuant(alpha=None)


def error(data: channels.Data, how: SmoothQuant | None, activations: Scheme) -> float:
    """The output error of the test tokens, smoothed by the peaks of the calibration tokens."""
    w = jnp.asarray(data.w)
    s = jnp.ones(w.shape[1])
    if how is not None:
        candidates = how.candidates(jnp.abs(jnp.asarray(data.train)).max(axis=0), [w])
        s = candidates[0]
        if how.searches:
            some = jnp.asarray(data.train[:512])
            losses = smoothed_losses(candidates, [w], some, [W8], activations)
            s = choose(candidates, losses).scale
    x = jnp.asarray(data.test) / s[None]
    left = np.asarray(dequantize(quantize_array(x, activations))).astype(np.float64)
    right = np.asarray(dequantize(quantize_array(w * s[None], W8))).astype(np.float64)
    exact = data.test.astype(np.float64) @ data.w.astype(np.float64).T
    return channels.output_error(data, left @ right.T - exact)


# method, activations -> how it is measured, and the published figure if there is one.
CELLS: dict[tuple[str, str], tuple[SmoothQuant | None, float | None]] = {
    ("plain", "per token"): (None, 7.9e-4),
    ("alpha 0.25", "per token"): (SmoothQuant(alpha=0.25), 2.1e-4),
    ("alpha 0.5", "per token"): (SmoothQuant(alpha=0.5), 1.28e-4),
    ("alpha 0.75", "per token"): (SmoothQuant(alpha=0.75), 2.2e-4),
    ("alpha 1", "per token"): (SmoothQuant(alpha=1.0), 7.7e-4),
    ("searched alpha", "per token"): (SEARCHED, None),
    ("plain", "per tensor"): (None, 5.1e-3),
    ("alpha 0.5", "per tensor"): (SmoothQuant(alpha=0.5), 4.0e-4),
    ("alpha 0.75", "per tensor"): (SmoothQuant(alpha=0.75), 3.2e-4),
    ("searched alpha", "per tensor"): (SEARCHED, None),
}


def rows() -> list[dict[str, Any]]:
    """Each cell: the median over the seeds, the published figure and our ratio to it."""
    drawn = [channels.draw(seed) for seed in SEEDS]
    found = []
    for (method, case), (how, anchor) in CELLS.items():
        values = [error(data, how, ACTIVATIONS[case]) for data in drawn]
        found.append(cell(method, f"W8A8, {case}", values, anchor))
    return found
