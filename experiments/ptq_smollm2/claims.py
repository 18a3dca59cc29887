"""What the run claims, of the rows that are there."""

from collections.abc import Mapping
from typing import Any

from peers import CALIBRATION, EVALUATION, PEERS
from rows import ROWS

# KL of a row over that of another, at most. What was found is in the README; windows of other text,
# and fewer of them, differ by that much.
RATIOS = {
    ("sym_range", "sym_round"): 0.9,
    ("sym_gptq", "sym_round"): 0.6,
    ("sym_gptq", "sym_range"): 0.95,
    ("sym_gptq_qep", "sym_gptq"): 1.0,
    ("asym_range", "asym_round"): 1.0,
    ("asym_gptq", "asym_round"): 0.8,
    ("asym_gptq_qep", "asym_gptq"): 1.0,
    ("awq", "asym_round"): 0.9,
    ("awq_gptq", "awq"): 1.0,
    ("channel_gptq", "channel_round"): 0.6,
    ("w3_gptq", "w3_round"): 0.6,
    ("w3_gptq_qep", "w3_gptq"): 1.0,
    ("w3_hqq", "w3_round"): 1.0,
    ("w2_awq_gptq", "w2_round"): 0.8,
    ("nf4_gptq", "nf4"): 1.0,
    ("mxfp4_even", "mxfp4"): 0.9,
    ("static_config", "static"): 0.3,
    ("static_eight", "static"): 0.3,
    ("only_o_static", "only_down_static"): 0.5,
    ("only_gate_up_static", "only_down_static"): 0.5,
    ("only_q_k_v_static", "only_down_static"): 0.5,
}
# On a few windows of 128 tokens, 1024 in all to calibrate with.
QUICK_RATIOS = {("sym_range", "sym_round"): 1.0, ("sym_gptq", "sym_round"): 0.8}
STATIC_KL = 0.06
"""Of the static recipe, on the tokens that peers were given."""
SAME_ROUNDING = 1.05
"""Where a row only rounds, as its peer does, no more than this."""
BEHIND = {"mxfp4": 1.5, "mxfp4_ceil": 1.1, "w8a8_smooth8": 1.2}
"""Rows that do not do what their peers do, and are behind them, and by how much at most. The README
says why; `mxfp4_even` and `w8a8_smooth8_norms` do the same."""


def broken(rows: Mapping[str, dict[str, Any]], *, quick: bool) -> list[str]:
    """What does not hold."""
    said = [
        f"{ours}: KL {rows[ours]['kl']:.4f}, more than {most} of {other}'s {rows[other]['kl']:.4f}"
        for (ours, other), most in (QUICK_RATIOS if quick else RATIOS).items()
        if ours in rows and other in rows
        if not rows[ours]["kl"] <= most * rows[other]["kl"]
    ]
    if quick:
        return said
    for name, row in rows.items():
        if name not in ROWS or not beside_peers(row) or (peer := ROWS[name].peer) is None:
            continue
        most = BEHIND.get(name, SAME_ROUNDING) * PEERS[peer].kl
        if not row["kl"] <= most:
            said.append(f"{name}: KL {row['kl']:.4f}, and the peer's is {PEERS[peer].kl}")
    static = rows.get("static_config")
    if static is not None and beside_peers(static) and not static["kl"] <= STATIC_KL:
        said.append(f"static_config: KL {static['kl']:.4f}, at most {STATIC_KL} claimed")
    return said


def beside_peers(row: Mapping[str, Any]) -> bool:
    """Whether a row is of the tokens that peers were given."""
    held = row["tokens"]
    same = held["evaluation"] == EVALUATION
    return same and (held["calibration"] == CALIBRATION or row.get("windows") == 0)
