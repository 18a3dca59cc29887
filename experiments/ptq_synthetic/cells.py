"""What is told of one cell of the tables."""

import statistics
from collections.abc import Sequence
from typing import Any


def cell(method: str, case: str, values: Sequence[float], anchor: float | None) -> dict[str, Any]:
    """The median over the seeds and how far they reach, the published figure, our ratio to it."""
    value = statistics.median(values)
    return {
        "method": method,
        "case": case,
        "value": value,
        "lowest": min(values),
        "highest": max(values),
        "anchor": anchor,
        "ratio": None if anchor is None else value / anchor,
    }
