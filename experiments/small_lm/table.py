"""The rows as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

HEAD = (
    "| | NLL | difference | KL | top-1 | bits a byte | bits a weight | MB | steps | s a step |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def table(rows: Sequence[Row]) -> str:
    return "\n".join((*HEAD, *map(line, rows)))


def line(row: Row) -> str:
    """One row; what it does not have is left empty."""
    cells = [
        f"`{row['name']}`: {row['what']}",
        f"{row['nll']:.4f}",
        _with_error(row, "nll_difference", "+"),
        _with_error(row, "kl", ""),
        _or_empty(row.get("top1"), "{:.1%}"),
        f"{row['bits_per_byte']:.3f}",
        f"{row['bits_per_weight']:.3f}",
        f"{row['bytes'] / 1e6:.2f}",
        _or_empty(row.get("steps"), "{}"),
        _or_empty(row.get("seconds_per_step"), "{:.2f}"),
    ]
    return f"| {' | '.join(cells)} |"


def _with_error(row: Row, name: str, sign: str) -> str:
    if row.get(name) is None:
        return ""
    return f"{row[name]:{sign}.4f} ± {row[f'{name}_stderr']:.4f}"


def _or_empty(value: Any, pattern: str) -> str:
    return "" if value is None else pattern.format(value)
