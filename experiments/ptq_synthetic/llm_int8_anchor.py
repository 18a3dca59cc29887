"""LLM.int8() on inputs with four large features, against published figures.

The figures come with "4 outlier dims" and no generator. Here inputs are normal numbers, four of 512
features `LARGER` times larger, and the weight is normal; `LARGER` was chosen such that plain
rounding, a scale a token, meets its figure. The other rows are then compared, not fitted.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from cells import cell

from jaxquant.algorithms import known_outliers
from jaxquant.numerics import INT8
from jaxquant.ops import dot_with_outliers, Outliers, OutlierWeights
from jaxquant.qarray import PER_CHANNEL, quantize_array, Scheme

SEEDS = range(7)
W8 = Scheme(values=INT8, tile=PER_CHANNEL)
OUT, FEATURES, TOKENS = 256, 512, 2048
OUTLIERS, LARGER = 4, 18.0
NUMBERS = (((1,), (1,)), ((), ()))


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight `[out, features]` and tokens `[tokens, features]`."""
    rng = np.random.Generator(np.random.PCG64(seed))
    w = rng.standard_normal((OUT, FEATURES)).astype(np.float32)
    x = rng.standard_normal((TOKENS, FEATURES)).astype(np.float32)
    x[:, rng.choice(FEATURES, OUTLIERS, replace=False)] *= np.float32(LARGER)
    return w, x


def error(w: np.ndarray, x: np.ndarray, outliers: Outliers) -> float:
    """`||off||^2 / ||x w^T||^2`, in float64; columns are known from other tokens of the kind."""
    known = {}
    if outliers.weights is OutlierWeights.ORIGINAL:
        peak = jnp.abs(jnp.asarray(x[: TOKENS // 2])).max(axis=0)
        found = known_outliers(jnp.asarray(w), peak, outliers)
        known = {"columns": found["outlier_columns"], "originals": found["outlier_weights"]}
    y = dot_with_outliers(
        jnp.asarray(x),
        quantize_array(jnp.asarray(w), W8),
        NUMBERS,
        activations=W8,
        outliers=outliers,
        **known,
    )
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    return float(((np.asarray(y) - exact) ** 2).sum() / (exact**2).sum())


# method, case -> how outliers are kept, and the published figure if there is one.
CELLS: dict[tuple[str, str], tuple[Outliers, float | None]] = {
    ("plain", "W8A8 per token"): (Outliers(threshold=math.inf), 1.29e-3),
    ("LLM.int8(), mask", "dequantized weights"): (Outliers(), 8.2e-5),
    ("LLM.int8(), gather", "dequantized weights"): (Outliers(columns=8), 8.2e-5),
    ("LLM.int8(), mask", "original weights"): (Outliers(weights=OutlierWeights.ORIGINAL), 4.0e-5),
    ("LLM.int8(), gather", "original weights"): (
        Outliers(weights=OutlierWeights.ORIGINAL, columns=8),
        4.0e-5,
    ),
}


def rows() -> list[dict[str, Any]]:
    """Each cell: the median over the seeds, the published figure and our ratio to it."""
    drawn = [draw(seed) for seed in SEEDS]
    found = []
    for (method, case), (outliers, anchor) in CELLS.items():
        values = [error(w, x, outliers) for w, x in drawn]
        found.append(cell(method, case, values, anchor))
    return found
