"""The demo's table as a picture: what is lost for the size, and the speeds."""

import pathlib
from typing import Any

_INK = "#333333"
_POINT = "#3b6fb6"
_COLOURS = {"prefill": "#3b6fb6", "decode": "#d98032"}


def write_plot(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes a PNG: size against KL, then prefill and decode in tokens a second.

    The first of `rows` is float32: a line in the first panel, the first bar in the others.
    """
    # Here, and not at the top: no other command needs it, and it takes a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    sizes, prefill, decode = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    _sizes(sizes, rows)
    _bars(prefill, rows, "prefill", "prefill, tokens/s")
    _bars(decode, rows, "decode", "decode, tokens/s")
    decode.set_yticklabels([])
    figure.savefig(path, metadata={"Software": None})


def _sizes(axes: Any, rows: list[dict[str, Any]]) -> None:
    plain, quantized = rows[0], rows[1:]
    floor = min((row["kl"] for row in quantized if row["kl"] > 0), default=1e-6) / 2
    # What loses nothing at all stands at the bottom: a logarithm has no place for it.
    points = [(row["bytes"] / 1e6, max(row["kl"], floor), row["name"]) for row in quantized]
    axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], s=45, color=_POINT, zorder=3)
    axes.set_yscale("log")
    axes.set_ylim(min(y for _, y, _ in points) / 3, max(y for _, y, _ in points) * 3)
    # Neighbours may lie close together: their names go above and below in turn.
    for index, (x, y, name) in enumerate(sorted(points, key=lambda point: -point[1])):
        below = index % 2 == 1
        axes.annotate(
            name,
            (x, y),
            xytext=(0, -7 if below else 7),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=9,
            color=_INK,
        )
    largest = plain["bytes"] / 1e6
    axes.set_xlim(0, 1.12 * largest)
    axes.axvline(largest, color=_INK, linewidth=1, linestyle="--")
    axes.annotate(
        "float32 (KL 0)",
        (largest, 0.5),
        xycoords=("data", "axes fraction"),
        rotation=90,
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=9,
        color=_INK,
    )
    axes.set_xlabel("size, MB")
    axes.set_ylabel("KL(float32 || quantized), nats a token")
    axes.set_title("what is lost for the size", fontsize=10, loc="left")
    axes.grid(alpha=0.25, which="major")
    _plain_frame(axes)


def _bars(axes: Any, rows: list[dict[str, Any]], key: str, title: str) -> None:
    names = [row["name"] for row in rows]
    speeds = [row[key]["tokens_per_second"] for row in rows]
    colours = ["#9aa0a6"] + [_COLOURS[key]] * (len(rows) - 1)
    bars = axes.barh(names, speeds, color=colours, height=0.7)
    labels = [f"{row[key]['ratio']:.2f}x" for row in rows]
    axes.bar_label(bars, labels, padding=3, fontsize=9, color=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(speeds))
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(axis="y", length=0)
    axes.grid(alpha=0.25, axis="x")
    axes.set_axisbelow(True)
    _plain_frame(axes)


def _plain_frame(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
