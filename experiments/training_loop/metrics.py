"""Metrics as JSON lines: one object a line, `step` in each."""

import json
import os
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; the last may have been cut by a kill."""
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]


class Metrics:
    """A file that lines are added to.

    Opened at a step, lines of later ones are dropped: a run that was killed and goes on writes what
    it would have written. `skipped` is how many steps in the file were.
    """

    def __init__(self, path: Path, *, step: int):
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        self.skipped = sum("skipped" in row for row in kept)
        part = path.with_suffix(".part")
        part.write_text("".join(map(_line, kept)), encoding="utf-8")
        os.replace(part, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        self._file.write(_line({"step": step, **values}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
