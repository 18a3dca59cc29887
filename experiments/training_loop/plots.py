"""Curves of runs from their metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]


def smoothed(values: Sequence[float], share: float = 0.02) -> np.ndarray:
    """Means over a window of a share of all values, which ends at each."""
    x = np.asarray(values, np.float64)
    width = max(1, round(share * len(x)))
    sums = np.cumsum(np.concatenate([[0.0], x]))
    ends = np.arange(1, len(x) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_runs(runs: Mapping[str, Rows], path: Path, *, score: str, title: str) -> None:
    """Losses of batches as thin lines, and `score` of the evaluations as thick ones with points."""
    # With no backend chosen and no window: also where there is no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, rows) in enumerate(runs.items()):
        color = f"C{number}"
        losses = [row for row in rows if row.get("loss") is not None]
        held = [row for row in rows if score in row]
        axes.plot(
            [row["step"] for row in losses],
            smoothed([row["loss"] for row in losses]),
            color=color, linewidth=0.8, alpha=0.6,
        )  # fmt: skip
        axes.plot(
            [row["step"] for row in held],
            [row[score] for row in held],
            color=color, marker="o", markersize=3, label=name,
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="nats a token", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
