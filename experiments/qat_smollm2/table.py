"""The rows as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from .claims import RECOVERED, recovered

Row = Mapping[str, Any]

HEAD = (
    "| | bits | NLL | difference | recovered | KL | top-1 | steps | s a step |",
    "|---|---|---|---|---|---|---|---|---|",
)
SAME = (
    "| | NLL in training | by the command line | flipped likeliest tokens | flipped codes "
    "| sites with the same bits | largest difference of a site |",
    "|---|---|---|---|---|---|---|",
)
MEMORY = (
    "| | loss, first | loss, last | trained | optimizer | fixed | temporary | peak RSS |",
    "|---|---|---|---|---|---|---|---|",
)


def everything(rows: Mapping[str, Row]) -> str:
    """All tables of which there are rows."""
    parts = ["\n".join((*HEAD, *(_line(row, rows) for row in rows.values())))]
    if same := [row for row in rows.values() if "cli_nll" in row]:
        parts.append("### In training and after\n\n" + "\n".join((*SAME, *map(_same, same))))
    if held := [row for row in rows.values() if "memory" in row]:
        parts.append("### Memory, in MB\n\n" + "\n".join((*MEMORY, *map(_memory, held))))
    return "\n\n".join(parts)


def _line(row: Row, rows: Mapping[str, Row]) -> str:
    lost = next((b for a, b in RECOVERED[False] if row["name"].startswith(b.partition("_")[0])), "")
    share = recovered(row, rows[lost]) if lost in rows and lost != row["name"] else None
    cells = [
        f"`{row['name']}`: {row['what']}",
        f"{row['bits_per_weight']:.3f}",
        f"{row['nll']:.4f}",
        _with_error(row, "nll_difference", "+"),
        _or_empty(share, "{:.0%}"),
        _with_error(row, "kl", ""),
        f"{row['top1']:.1%}",
        _or_empty(row.get("steps"), "{}"),
        _or_empty(row.get("seconds_per_step"), "{:.2f}"),
    ]
    return _joined(cells)


def _same(row: Row) -> str:
    sites, flips = row.get("sites") or {}, row.get("flipped_codes")
    cells = [
        f"`{row['name']}`",
        f"{row['trained_nll']:.6f}",
        f"{row['cli_nll']:.6f}",
        f"{row['flipped_argmax']:.3%}",
        _or_empty(None if flips is None else flips["mean"], "{:.3%}"),
        f"{sum(x == 0 for x in sites.values())} of {len(sites)}" if sites else "",
        _or_empty(max(sites.values()) if sites else None, "{:.1e}"),
    ]
    return _joined(cells)


def _memory(row: Row) -> str:
    names = ("trained", "optimizer", "fixed", "temporary", "peak_rss")
    losses = (f"{row['losses'][name]:.4f}" for name in ("first", "last"))
    held = row["memory"]
    sizes = (f"{held[name] / 1e6:.1f}" if name in held else "" for name in names)
    return _joined([f"`{row['name']}`", *losses, *sizes])


def _with_error(row: Row, name: str, sign: str) -> str:
    error = row.get(f"{name}_stderr")
    spread = "" if error is None else f" ± {error:.4f}"
    return f"{row[name]:{sign}.4f}{spread}"


def _or_empty(value: Any, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def _joined(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
