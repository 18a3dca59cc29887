"""What the run claims, of the rows that are there."""

import math
from collections.abc import Mapping
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]

# Of the NLL that rounding loses, what training has to bring back, at least.
RECOVERED = {
    False: {("w4a8_qat", "w4a8_round"): 0.5, ("w2_qat", "w2_round"): 0.5},
    # 3 of 30 layers, and a few steps on few tokens.
    True: {("w4a8_qat", "w4a8_round"): 0.1, ("w2_qat", "w2_round"): 0.3},
}
BETTER = (("w2_qat", "w2_gptq"),)
"""The first has a lower NLL than the second."""
CONVERTED = 1e-4
"""Mean NLL in training and by the command line."""
SAME_BITS = ("w4a8_qat",)
"""Rows whose sites multiply integers: a site gives the same bits in training and after."""
FLOAT_SITES = 1e-5
"""Of the others: float32 added up in another order, over its largest magnitude. A sum of 1536 terms
is off by at most 1536 * 2^-24 = 9e-5 of the sum of magnitudes, and by its root for roundings that
are not of one sign: 2e-6."""
STEP_TIME = 1.15
"""Seconds of a step in few bits over those in float32, at most."""


def broken(rows: Rows, *, quick: bool) -> list[str]:
    """What does not hold."""
    said = []
    for (ours, rounding), least in RECOVERED[quick].items():
        if ours in rows and rounding in rows:
            share = recovered(rows[ours], rows[rounding])
            if not share >= least:
                said.append(f"{ours}: {share:.1%} of what {rounding} loses; {least:.0%} claimed")
    for ours, other in () if quick else BETTER:
        if ours in rows and other in rows and not rows[ours]["nll"] < rows[other]["nll"]:
            said.append(f"{ours}: NLL {rows[ours]['nll']:.4f}, {other} {rows[other]['nll']:.4f}")
    for name, row in rows.items():
        said += [f"{name}: {what}" for what in _of_row(name, row)]
    if "qlora" in rows and "full" in rows:
        ours, theirs = (rows[name]["memory"] for name in ("qlora", "full"))
        for what in ("trained", "optimizer", "peak_rss"):
            if not ours[what] < theirs[what]:
                said.append(f"qlora: {what} {ours[what]:,} bytes, full {theirs[what]:,}")
    return said


def recovered(row: Mapping[str, Any], rounding: Mapping[str, Any]) -> float:
    """The share of the NLL that rounding loses which a row does not."""
    lost = rounding["nll_difference"]
    return (lost - row["nll_difference"]) / lost if lost > 0 else math.nan


def _of_row(name: str, row: Mapping[str, Any]) -> list[str]:
    said = []
    if "cli_nll" in row and not abs(row["cli_nll"] - row["trained_nll"]) <= CONVERTED:
        said.append(f"NLL {row['trained_nll']} in training, {row['cli_nll']} by the command line")
    most = 0.0 if name in SAME_BITS else FLOAT_SITES
    off = {site: x for site, x in row.get("sites", {}).items() if not x <= most}
    if off:
        worst = max(off, key=lambda site: off[site])
        said.append(f"{len(off)} sites differ from training, {worst} by {off[worst]:.1e}")
    if "losses" in row and not row["losses"]["last"] < row["losses"]["first"]:
        said.append(f"the loss went from {row['losses']['first']} to {row['losses']['last']}")
    if row.get("codes_unchanged") is False:
        said.append("frozen codes changed")
    return said


def slow(ratio: float) -> list[str]:
    """What does not hold of step times."""
    if ratio <= STEP_TIME:
        return []
    return [f"a step in few bits takes {ratio:.3f} times float32's; {STEP_TIME} claimed"]
