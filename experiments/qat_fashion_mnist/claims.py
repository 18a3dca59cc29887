"""The table, means over seeds, and what of the claim does not hold."""

import statistics
from typing import Any

from settings import FLOAT, LSQ, METHODS, MOST_FLIPPED, Settings, STE, TUNED

Table = list[dict[str, Any]]


def means(rows: list[dict[str, Any]]) -> Table:
    """One entry for each model, method and number of bits."""
    found = []
    order = (FLOAT, TUNED, *METHODS)
    keys = {(row["model"], row["method"], row["bits"]) for row in rows}
    for model, method, bits in sorted(keys, key=lambda k: (k[0], -k[2], order.index(k[1]))):
        own = [r for r in rows if (r["model"], r["method"], r["bits"]) == (model, method, bits)]
        accuracies = [row["accuracy"] for row in sorted(own, key=lambda row: row["seed"])]
        entry = {
            "model": model,
            "method": method,
            "bits": bits,
            "bits_per_weight": own[0]["bits_per_weight"],
            "accuracy": statistics.mean(accuracies),
            "spread": statistics.stdev(accuracies) if len(own) > 1 else None,
            "accuracies": accuracies,
            "seconds": statistics.mean(row["total_seconds"] for row in own),
        }
        if "step_seconds" in own[0]:
            entry["step_seconds"] = statistics.median(row["step_seconds"] for row in own)
        if "flipped" in own[0]:
            entry["flipped"] = max(row["flipped"] for row in own)
            entry["equal_images"] = min(row["equal_images"] for row in own)
        found.append(entry)
    return found


def broken(table: Table, size: Settings) -> list[str]:
    """Every claim that does not hold, in words."""
    complaints = []
    for model in sorted({entry["model"] for entry in table}):
        own = {(e["method"], e["bits"]): e for e in table if e["model"] == model}
        plain = max(own[method, 32]["accuracy"] for method in (FLOAT, TUNED))
        four, two = (own[LSQ, bits]["accuracy"] for bits in (4, 2))
        if not four >= plain - size.most_lost:
            complaints.append(
                f"{model}: LSQ in 4 bits is right on {four:.2f} %, float32 on {plain:.2f} %; at "
                f"most {size.most_lost} points less are claimed"
            )
        plainly = own[STE, 2]["accuracy"]
        if not two > plainly + size.least_won:
            complaints.append(
                f"{model}: in 2 bits LSQ is right on {two:.2f} %, straight-through training on "
                f"{plainly:.2f} %; more than {size.least_won} points are claimed"
            )
    for entry in table:
        most = MOST_FLIPPED * size.tests
        if entry.get("flipped", 0) > most:
            complaints.append(
                f"{entry['model']} {entry['method']} {entry['bits']}: converting changed the "
                f"answer to {entry['flipped']} of {size.tests} images; at most {most:.0f} claimed"
            )
    return complaints


def as_text(table: Table) -> str:
    """The table in Markdown."""
    lines = [
        "| model | method | bits | bits a weight | test accuracy | by seed | ms a step | flipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in table:
        spread = "" if entry["spread"] is None else f" ± {entry['spread']:.2f}"
        step = entry.get("step_seconds")
        cells = (
            entry["model"],
            entry["method"],
            entry["bits"],
            f"{entry['bits_per_weight']:.2f}",
            f"{entry['accuracy']:.2f}{spread}",
            ", ".join(f"{x:.2f}" for x in entry["accuracies"]),
            "" if step is None else f"{1000 * step:.0f}",
            entry.get("flipped", ""),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
