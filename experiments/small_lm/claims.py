"""What the run claims, of the rows that are there."""

from collections.abc import Mapping
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]

# Nats a token above float32's, at most, of models trained for as many steps.
ABOVE_FLOAT = {
    False: {"int4": 0.03, "int4_distilled": 0.0, "int4_lsq": 0.03, "bitnet": 0.10},
    True: {"int4": 0.15, "bitnet": 0.60},
}
# KL from float32 of a row over that of another, at most: the same bits, chosen better.
RATIOS = {
    False: {
        ("asym_gptq", "asym_round"): 0.6,
        ("asym_awq", "asym_round"): 1.0,
        ("asym_qat_distilled", "asym_round"): 0.5,
        ("asym_qat_distilled", "asym_gptq"): 0.9,
    },
    True: {("asym_qat_distilled", "asym_round"): 0.9},
}
# Mean NLL of the model in training and of the converted one: the same codes, summed in other
# programs.
CONVERTED = 1e-4
# Nats a token, of a run from nothing: below what a uniform guess among the tokens gets.
LEARNED = 1.5


def broken(rows: Rows, *, quick: bool) -> list[str]:
    """What does not hold."""
    said = []
    for name, most in ABOVE_FLOAT[quick].items():
        if name in rows and not rows[name]["nll_difference"] <= most:
            said.append(f"{name}: {rows[name]['nll_difference']:+.4f} nats, at most {most} claimed")
    for (ours, other), most in RATIOS[quick].items():
        if ours in rows and other in rows and not rows[ours]["kl"] <= most * rows[other]["kl"]:
            said.append(
                f"{ours}: KL {rows[ours]['kl']:.5f}, more than {most} of {other}'s "
                f"{rows[other]['kl']:.5f}"
            )
    for name, row in rows.items():
        if "guess_nll" in row and not row["nll"] <= row["guess_nll"] - LEARNED:
            said.append(f"{name}: {row['nll']:.4f} nats; guessing has {row['guess_nll']:.4f}")
        if "trained_nll" in row and not abs(row["trained_nll"] - row["nll"]) <= CONVERTED:
            said.append(f"{name}: {row['trained_nll']} in training, {row['nll']} converted")
    return said
