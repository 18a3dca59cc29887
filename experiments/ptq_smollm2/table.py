"""The rows as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from claims import beside_peers
from peers import EVALUATION, PEERS
from rows import EIGHT_BITS, FEWER_BITS, FLOATS, FOUR_BITS, KINDS, Row, ROWS, SITES
from static_sites import sites_table

PARTS = {
    "Four bits": FOUR_BITS,
    "Four-bit floats": FLOATS,
    "Three and two bits": FEWER_BITS,
    "Eight bits, activations too": EIGHT_BITS,
    "One kind of site static": KINDS,
}
HEAD = (
    "| | bits | KL | NLL | windows | s | of it compiling | GB | peer: KL | NLL | s | GB |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def everything(rows: Mapping[str, dict[str, Any]]) -> str:
    """All tables of which there are rows."""
    parts = []
    for title, own in PARTS.items():
        here = [row for row in own if row.name in rows]
        if here:
            parts.append(f"### {title}\n\n{one_table(here, rows)}")
    if unseen := unseen_table(rows):
        parts.append(f"### Windows that nothing was chosen by\n\n{unseen}")
    if SITES in rows:
        parts.append(f"### Sites by their inputs\n\n{sites_table(rows[SITES]['sites'])}")
    return "\n\n".join(parts)


def one_table(wanted: Sequence[Row], rows: Mapping[str, dict[str, Any]]) -> str:
    return "\n".join((*HEAD, *(_line(ROWS[row.name], rows[row.name]) for row in wanted)))


def unseen_table(rows: Mapping[str, dict[str, Any]]) -> str:
    """KL of the rows whose settings were compared on some of the scored windows: on the others.

    Damping, search, and how much is corrected were compared on each third and each fourth window.
    """
    lines = ["| | all windows | unseen | seen |", "|---|---|---|---|"]
    for row in (*FOUR_BITS, *FEWER_BITS):
        found = rows.get(row.name)
        if found is None or found["tokens"]["evaluation"] != EVALUATION:
            continue
        kl = np.asarray(found["kl_per_window"])
        at = np.arange(len(kl))
        seen = (at % 3 == 0) | (at % 4 == 0)
        unseen, others = (_with_error("", *_mean(x)) for x in (kl[~seen], kl[seen]))
        lines.append(f"| `{row.name}` | {found['kl']:.4f} | {unseen} | {others} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _mean(x: np.ndarray) -> tuple[float, float]:
    """With its standard error."""
    return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))


def _line(row: Row, found: dict[str, Any]) -> str:
    cells = [
        f"`{row.name}`: {row.what}",
        f"{found['bits_per_weight']:.3f}",
        _with_error("", found["kl"], found["kl_stderr"]),
        _with_error("+", found["nll_difference"], found["nll_difference_stderr"]),
        str(found["windows"] or "none"),
        f"{found['seconds']:.0f}",
        f"{found['compile_seconds']:.0f}",
        f"{found['rss_bytes'] / 1e9:.1f}",
        *_peer(row, beside_peers(found)),
    ]
    return f"| {' | '.join(cells)} |"


def _with_error(sign: str, value: float, error: float | None) -> str:
    spread = "" if error is None else f" ± {error:.4f}"
    return f"{value:{sign}.4f}{spread}"


def _peer(row: Row, same_tokens: bool) -> tuple[str, str, str, str]:
    """The cells of a peer; empty where there is none, or where it had other tokens."""
    peer = PEERS.get(row.peer or "")
    if peer is None or not same_tokens:
        return "", "", "", ""
    rss = "" if peer.rss is None else f"{peer.rss}"
    return f"{peer.kl:.3f} ({peer.what})", f"{peer.nll:+.3f}", peer.seconds or "", rss
