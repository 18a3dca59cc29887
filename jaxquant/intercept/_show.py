"""Plans and accounts as text that fits a terminal of 100 columns."""

import textwrap
from typing import Any

WIDTH = 100


def size_text(n: int | float) -> str:
    """Bytes in the unit that keeps three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def plan_table(plan: Any) -> str:
    """A site a line, then parameters that no site reads, then totals."""
    lines = [f"plan {plan.fingerprint} by the recipe {plan.recipe!r}"]
    sites = [_fitted(site.site, 46) for site in plan.sites]
    width = max(map(len, sites), default=0)
    for site, name in zip(plan.sites, sites, strict=True):
        shape = "x".join(map(str, site.shape))
        leaf = plan.by_path.get(site.path)
        if site.op == "product" and site.reason is None:
            lines += _row(name, width, shape, f"both sides {site.activations}", "")
            continue
        if site.weights is None:
            lines += _row(name, width, shape, f"left: {site.reason}", "")
            continue
        assert leaf is not None
        scheme = str(site.weights)
        if site.activations is not None:
            scheme += f" / {site.activations}"
        change = f"{size_text(leaf.bytes_before)} -> {size_text(leaf.bytes_after)}"
        lines += _row(name, width, shape, scheme, change)
    for leaf in plan.leaves:
        for axis in leaf.replicated:
            lines += _wrapped(
                f"{leaf.path}: scales replicated on axis {axis}, which {leaf.spec[axis]} shards: "
                f"tiles of {leaf.tile[axis]} do not fall on shards of {leaf.shape[axis]}"
            )
    for path, ops in plan.others:
        lines += _wrapped(f"{path}: no site; read by {ops}")
    saved = f"{size_text(plan.bytes_before)} -> {size_text(plan.bytes_after)}"
    lines.append(f"{len(plan.sites)} sites, {len(plan.leaves)} parameters quantized, {saved}")
    return "\n".join(lines)


def _row(name: str, width: int, shape: str, text: str, change: str) -> list[str]:
    """Columns; what does not fit goes on, indented, in lines of its own."""
    start = f"{name:<{width}}  {shape:>12}  "
    if len(start) + max(30, len(text)) + len(change) + 2 <= WIDTH:
        return [f"{start}{text:<30}  {change}".rstrip()]
    return [f"{start}{change}".rstrip(), *_wrapped(text, "    ")]


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent="    ")


def _fitted(name: str, width: int) -> str:
    """A path, shortened in its middle where it is too long: both ends tell it apart."""
    if len(name) <= width:
        return name
    end = width * 2 // 3
    return f"{name[: width - end - 3]}...{name[-end:]}"
