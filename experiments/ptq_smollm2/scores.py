"""What the scoring of a row tells, and how many bits its weights take."""

from typing import Any

import numpy as np

import jaxquant as jq
from jaxquant.evaluate import Evaluation


def scores(scored: Evaluation) -> dict[str, Any]:
    """Means over windows with their standard errors; the windows themselves, for other pairs."""
    assert scored.kl_per_window is not None
    kl = np.asarray(scored.kl_per_window)
    error = float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else None
    return {
        "kl": scored.kl,
        "kl_stderr": error,
        "nll": scored.nll,
        "nll_difference": scored.nll_difference,
        "nll_difference_stderr": scored.nll_difference_stderr,
        "top1": scored.top1,
        "kl_per_window": [round(float(x), 6) for x in kl],
    }


def bits(plan: jq.Plan) -> float:
    """Of a weight that is quantized, with its scales and zero points."""
    values = sum(dict(plan.counts)[leaf.path] for leaf in plan.leaves)
    return 8 * sum(leaf.bytes_after for leaf in plan.leaves) / values
