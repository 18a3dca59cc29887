"""Test error by bits, a panel for each model: lines through means, a point for each seed."""

import pathlib
import statistics
from typing import Any

from settings import FLOAT, METHODS, TUNED

TICKS = (6, 8, 10, 15, 20, 30, 50, 90)
COLOURS = {"lsq": "#3b6fb6", "ste_fixed": "#5a9e6f", "ste": "#d98032", "ptq": "#8a8a8a"}
NAMES = {
    "lsq": "LSQ",
    "ste_fixed": "straight-through, ranges that err least",
    "ste": "straight-through, ranges from peaks",
    "ptq": "rounding after training",
}


def write_plot(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = sorted({row["model"] for row in rows})
    figure = Figure(figsize=(5.2 * len(models), 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        _panel(axes, model, [row for row in rows if row["model"] == model])
    panels[0].set_ylabel("test error, % (log)")
    panels[-1].legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Software": None})


def _panel(axes: Any, model: str, rows: list[dict[str, Any]]) -> None:
    bits = sorted({row["bits"] for row in rows if row["bits"] < 32}, reverse=True)
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        points = [(bits.index(row["bits"]), 100 - row["accuracy"]) for row in own]
        places = sorted({x for x, _ in points})
        middle = [statistics.mean(y for x, y in points if x == place) for place in places]
        axes.plot(places, middle, color=COLOURS[method], label=NAMES[method], linewidth=1.4)
        if points:
            axes.scatter(*zip(*points, strict=True), color=COLOURS[method], s=14, zorder=3)
    plain = [100 - row["accuracy"] for row in rows if row["method"] in (FLOAT, TUNED)]
    axes.axhspan(min(plain), max(plain), color="#333333", alpha=0.25, linewidth=0, label="float32")
    axes.set_xticks(range(len(bits)), [str(b) for b in bits])
    axes.set_xlabel("bits of weights and activations")
    axes.set_yscale("log")
    axes.set_yticks(TICKS, map(str, TICKS))
    axes.minorticks_off()
    axes.set_title(model)
