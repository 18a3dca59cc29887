"""The rows as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from claims import beside_peers
from peers import PEERS
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
    if SITES in rows:
        parts.append(f"### Sites by their inputs\n\n{sites_table(rows[SITES]['sites'])}")
    return "\n\n".join(parts)


def one_table(wanted: Sequence[Row], rows: Mapping[str, dict[str, Any]]) -> str:
    return "\n".join((*HEAD, *(_line(ROWS[row.name], rows[row.name]) for row in wanted)))


def _line(row: Row, found: dict[str, Any]) -> str:
    cells = [
        row.what,
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
