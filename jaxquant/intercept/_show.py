"""Plans and accounts as text that fits a terminal of 100 columns."""

import textwrap
from collections.abc import Sequence

from ._account import Account, SiteAccount

WIDTH = 100
_SHORTEST_NAME = 30
_LONGEST_SHAPE = 20
_LONGEST_RULE = 12
_GAP = "  "


def size_text(n: int | float) -> str:
    """Bytes in the unit that keeps three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def account_table(account: Account) -> str:
    """A site a line, then parameters that no site reads, then totals.

    The column of the noise is there once weights were measured.
    """
    plan = account.plan
    lines = [f"plan {plan.fingerprint} by the recipe {plan.recipe!r}"]
    lines += site_lines(account.sites, measured=bool(account.errors))
    for leaf in plan.leaves:
        for axis in leaf.replicated:
            lines += _wrapped(
                f"{leaf.path}: scales replicated on axis {axis}, which {leaf.spec[axis]} shards: "
                f"tiles of {leaf.tile[axis]} do not fall on shards of {leaf.shape[axis]}"
            )
    lines += backend_lines(plan.backends)
    for path, ops in plan.others:
        lines += _wrapped(f"{path}: no site; read by {ops}")
    for note in account.notes:
        lines += _wrapped(note)
    lines += _wrapped(
        f"{account.quantized} sites quantized, {account.left} left; {account.parameters:,} "
        f"parameters, {size_text(account.bytes_before)} -> {size_text(account.bytes_after)}, "
        f"{account.bits_per_weight:.3f} bits a weight"
    )
    return "\n".join(lines)


def backend_lines(backends: Sequence[tuple[str, str, str | None]]) -> list[str]:
    """A line for each way in which products are computed, with the sites that take it.

    Each is a site, its backend, and why it is not the first choice of the device.
    """
    groups: dict[tuple[str, str | None], list[str]] = {}
    for site, name, reason in backends:
        groups.setdefault((name, reason), []).append(site)
    lines = []
    for (name, reason), sites in groups.items():
        listed = ", ".join(sites[:3]) + (", ..." if len(sites) > 3 else "")
        count = f"{len(sites)} product{'s' if len(sites) > 1 else ''}"
        why = "" if reason is None else f" ({listed}): {reason}"
        lines += _wrapped(f"{count} computed by {name}{why}")
    return lines


def site_lines(sites: tuple[SiteAccount, ...], *, measured: bool) -> list[str]:
    """Columns: site, shape, how it is held, bits a value, noise, rule.

    How it is held: weights (by which methods) / activations, `static` if their scales are, and
    `below` what size they are rounded, if outliers are kept apart.
    """
    if not sites:
        return []
    head = ("shape", "scheme", "bits", "SQNR dB", "rule")
    rows = [
        (
            _fitted("x".join(map(str, site.shape)), _LONGEST_SHAPE),
            _held(site),
            f"{site.bits_per_value:.3f}",
            _decibels(site),
            _fitted(site.rule or "", _LONGEST_RULE),
        )
        for site in sites
    ]
    own = [row for row, site in zip(rows, sites, strict=True) if site.reason is None]
    shape, _, bits, noise, rule = (max(map(len, c)) for c in zip(head, *rows, strict=True))
    ends = [bits, noise, rule] if measured else [bits, rule]
    room = WIDTH - _SHORTEST_NAME - sum(len(_GAP) + width for width in (shape, 0, *ends))
    held = min(room, max(len(row[1]) for row in (head, *own)))
    others = sum(len(_GAP) + width for width in (shape, held, *ends))
    longest = max(4, *(len(site.site) for site in sites))
    name = min(longest, max(WIDTH - others, _SHORTEST_NAME))
    lines = []
    for site, row in zip((None, *sites), (head, *rows), strict=True):
        said = "site" if site is None else _fitted(site.site, name)
        start = f"{said:<{name}}{_GAP}{row[0]:>{shape}}{_GAP}"
        text = row[1]
        if site is not None and site.reason is not None:
            fits = len(start) + len(text) <= WIDTH
            lines += [start + text] if fits else [start.rstrip(), *_wrapped(text, "    ")]
            continue
        cells = [f"{row[2]:>{bits}}", *([f"{row[3]:>{noise}}"] if measured else []), row[4]]
        beside = text if len(text) <= held else ""
        lines.append(f"{start}{beside:<{held}}{_GAP}{_GAP.join(cells)}".rstrip())
        lines += [] if beside else _wrapped(text, "    ")
    return lines


def _held(site: SiteAccount) -> str:
    if site.reason is not None:
        return f"left: {site.reason}"
    if site.weights is None:
        return f"both sides {site.activations}"
    trained = site.training
    by = [site.scaling, site.algorithm, trained.weights if trained else None]
    methods = [each.name for each in by if each is not None]
    held = f"{site.weights} ({', '.join(methods)})" if methods else str(site.weights)
    if site.activations is None:
        return held
    below = "" if site.outliers is None else f" below {site.outliers.threshold:g}"
    static = " static" if site.static else ""
    if trained and trained.activations.learned:
        static = f" ({trained.activations.name})"
    return f"{held} / {site.activations}{static}{below}"


def _decibels(site: SiteAccount) -> str:
    if site.reason is not None or site.error is None:
        return ""
    return "exact" if site.sqnr_db is None else f"{site.sqnr_db:.1f}"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent="    ")


def _fitted(name: str, width: int) -> str:
    """A path, shortened in its middle where it is too long: both ends tell it apart."""
    if len(name) <= width:
        return name
    end = width * 2 // 3
    return f"{name[: width - end - 3]}...{name[-end:]}"
