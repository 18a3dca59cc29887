"""The results as text of at most 100 columns."""

import textwrap
from typing import Any

WIDTH = 100
COLUMNS = (3, 35, 31, 31)


def table(rows: list[dict[str, Any]]) -> str:
    """A line a case: what each library came to."""
    lines = [_line("#", "case", "qwix", "jaxquant"), "-" * WIDTH]
    lines += [
        _line(str(row["case"]), row["title"], _cell(row, "qwix"), _cell(row, "jaxquant"))
        for row in rows
    ]
    counts = []
    for library in ("qwix", "jaxquant"):
        ran = [row[f"{library}_ok"] for row in rows if row[f"{library}_ok"] is not None]
        counts.append(f"{sum(ran)} of {len(ran)} right")
    return "\n".join([*lines, "-" * WIDTH, _line("", "", *counts)])


def _line(*cells: str) -> str:
    fitted = (
        textwrap.shorten(c, w - 1, placeholder="~") for c, w in zip(cells, COLUMNS, strict=True)
    )
    return "".join(f"{c:{w}}" for c, w in zip(fitted, COLUMNS, strict=True)).rstrip()


def _cell(row: dict[str, Any], library: str) -> str:
    parts = row[library]
    if not parts:
        built = library != "jaxquant" or row["jaxquant_built"]
        return "not run" if built else "not built yet"
    right = sum(part["ok"] for part in parts.values())
    raised = sum("raised" in part for part in parts.values())
    word = "right" if row[f"{library}_ok"] else "raised" if raised == len(parts) else "WRONG"
    if len(parts) > 1:
        if raised == len(parts):
            return f"{word}: all {raised} parts"
        said = f"{right} of {len(parts)} parts"
        return f"{word}: {said}, {raised} raised" if raised else f"{word}: {said}"
    (part,) = parts.values()
    return f"{word}: {part.get('said') or part['raised'].partition(':')[0]}"


def details(rows: list[dict[str, Any]]) -> str:
    """What was measured, or said, in every part that did not come out right."""
    lines = []
    for row in rows:
        for library in ("qwix", "jaxquant"):
            for name, part in row[library].items():
                if part["ok"]:
                    continue
                said = part.get("said") or part["raised"]
                text = f"{row['case']:>2} {library}, {name}: {said}"
                lines.append(textwrap.shorten(text, WIDTH, placeholder=" ..."))
    return "\n".join(["", *lines]) if lines else ""
