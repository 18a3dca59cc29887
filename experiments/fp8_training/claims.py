"""What the run claims: held-out NLL against bfloat16's, paired by seed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]

BASE = "bfloat16"
# Percent of bfloat16's NLL, on top of two standard errors.
MOST = {
    "fp8_train_current": 0.25,
    "fp8_train_row": 0.25,
    "fp8_train_block": 0.25,
    "fp8_train_delayed": 0.5,
}
MOST_ERROR = 0.25
"""Percent: the standard error above which more seeds are needed to say anything."""
QUICK_SLACK = 1.0
"""Percent that `--quick` allows besides: one seed, few steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean NLL, and the mean difference to bfloat16 with its standard error over seeds, in percent.

    Of one seed there is no error.
    """

    arithmetic: str
    seeds: int
    nll: float
    percent: float
    error: float | None


def differences(rows: Rows) -> list[Difference]:
    """One for each arithmetic, over the seeds that bfloat16 has too."""
    by_name = {(row["arithmetic"], row["seed"]): row["nll"] for row in rows}
    seeds = sorted(seed for name, seed in by_name if name == BASE)
    found = []
    for name in dict.fromkeys(row["arithmetic"] for row in rows):
        own = [s for s in seeds if (name, s) in by_name]
        if not own:
            continue
        parts = [100 * (by_name[name, s] / by_name[BASE, s] - 1) for s in own]
        error = float(np.std(parts, ddof=1)) / len(parts) ** 0.5 if len(parts) > 1 else None
        found.append(
            Difference(
                arithmetic=name,
                seeds=len(own),
                nll=float(np.mean([by_name[name, s] for s in own])),
                percent=float(np.mean(parts)),
                error=error,
            )
        )
    return found


def broken(found: Sequence[Difference], *, quick: bool) -> list[str]:
    """What does not hold."""
    said = []
    for each in found:
        if each.arithmetic not in MOST:
            continue
        if each.error is None and not quick:
            said.append(f"{each.arithmetic}: one seed, and so no standard error")
            continue
        error = each.error or 0.0
        most = MOST[each.arithmetic] + 2 * error + (QUICK_SLACK if quick else 0.0)
        # A NaN is no success.
        if not each.percent <= most:
            said.append(f"{each.arithmetic}: {each.percent:+.3f} %, at most {most:.3f} % claimed")
        if error > MOST_ERROR and not quick:
            said.append(f"{each.arithmetic}: a standard error of {error:.3f} %: more seeds")
    return said


HEAD = (
    "| arithmetic | seeds | NLL | against bfloat16 |",
    "|---|---|---|---|",
)


def as_table(found: Sequence[Difference]) -> str:
    """The differences in Markdown."""
    return "\n".join((*HEAD, *map(_line, found)))


def _line(each: Difference) -> str:
    error = "" if each.error is None else f" ± {each.error:.3f}"
    change = "" if each.arithmetic == BASE else f"{each.percent:+.3f}{error} %"
    return f"| `{each.arithmetic}` | {each.seeds} | {each.nll:.4f} | {change} |"
