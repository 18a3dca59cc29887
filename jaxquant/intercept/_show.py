"""Plans and accounts as text that fits a terminal of 100 columns."""

from typing import Any

WIDTH = 100


def size_text(n: float) -> str:
    """Bytes in the unit that keeps three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def plan_table(plan: Any) -> str:
    """One line a site, then parameters that no site reads, then totals."""
    rows = []
    for site in plan.sites:
        leaf = plan.by_path.get(site.path)
        shape = "x".join(map(str, site.shape))
        if site.weights is None:
            rows.append((site.site, shape, f"left: {site.reason}", ""))
            continue
        scheme = str(site.weights)
        if site.activations is not None:
            scheme += f" / {site.activations}"
        assert leaf is not None
        change = f"{size_text(leaf.bytes_before)} -> {size_text(leaf.bytes_after)}"
        rows.append((site.site, shape, scheme, change))
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1, 3)]
    room = max(20, WIDTH - sum(widths) - 6)
    lines = [f"plan {plan.fingerprint} by the recipe {plan.recipe!r}"]
    for name, shape, scheme, change in rows:
        if len(scheme) > room:
            scheme = scheme[: room - 3] + "..."
        lines.append(f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {scheme:<{room}}  {change}")
    for path, ops in plan.others:
        lines.append(f"{path}: no site; read by {ops}")
    saved = f"{size_text(plan.bytes_before)} -> {size_text(plan.bytes_after)}"
    lines.append(f"{len(plan.sites)} sites, {len(plan.leaves)} parameters quantized, {saved}")
    return "\n".join(lines)
