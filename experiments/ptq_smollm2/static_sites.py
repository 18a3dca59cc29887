"""What one scale for a whole tensor, fixed from data, does to the input of each site."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from rows import ROWS, STATIC

import jaxquant as jq
from jaxquant.algorithms import static_scale
from jaxquant.checkpoint import materialize
from jaxquant.cli._quantize import plan_for
from jaxquant.intercept import Extremes, Histogram
from jaxquant.models import OpenedModel

KINDS = {"q": "q, k, v", "o": "o", "gate": "gate, up", "down": "down"}
"""Sites that read one input are one row, under the first of them."""
BULK = 99.99
"""Percent of the values that `bulk_error` is about."""


def site_rows(model: OpenedModel, windows: np.ndarray) -> list[dict[str, Any]]:
    """A row for each input: what it holds, and the error of rounding it.

    `error` is `|x - round(x)|^2 / |x|^2` over all values; `bulk_error` is the same over the values
    whose magnitude does not exceed the percentile `BULK`, since a peak that is met exactly may be
    nearly all of `|x|^2`. 1 means that all of them become 0. `dynamic` tells whether `static_eight`
    leaves the site's ranges to be found token by token.
    """
    histogram = Histogram()
    batches = [(jnp.asarray(window[None], jnp.int32),) for window in windows]
    variables = materialize(model.variables)
    seen = jq.observe(model.model, variables, batches, observers=(Extremes(), histogram))
    plan = plan_for(model, ROWS["static_eight"].recipe)
    rows = []
    for site, found in seen.items():
        layer, _, kind = site.removesuffix("/kernel#dot").rpartition("/")
        if kind not in KINDS or not site.startswith("layers/"):
            continue
        width = found["extremes"]["high"].shape[-1]
        scale = float(np.asarray(static_scale(STATIC, found, stack=(), k=width)["scale"]).max())
        values, counts = histogram.sample(found["histogram"])
        high = float(histogram.percentile(found["histogram"], BULK))
        bulk = np.where(np.abs(values) <= high, counts, 0)
        rows.append(
            {
                "site": f"{layer.split('/')[1]} {KINDS[kind]}",
                "layer": int(layer.split("/")[1]),
                "kind": KINDS[kind],
                "peak": float(np.abs(values[counts > 0]).max()),
                "percentile": high,
                "error": relative_error(values, counts, scale),
                "bulk_error": relative_error(values, bulk, scale),
                "dynamic": not plan.by_site[site].static,
            }
        )
    return rows


def relative_error(values: np.ndarray, counts: np.ndarray, scale: float) -> float:
    """Of rounding values that occur so often to int8 with one scale."""
    off = np.clip(np.round(values / scale), -128, 127) * scale - values
    return float((counts * off**2).sum() / max((counts * values**2).sum(), 1e-30))


def sites_table(rows: list[dict[str, Any]], most: int = 16) -> str:
    """The sites whose bulk suffers most, and the medians of each kind."""
    lines = [
        "| input of | peak | 99.99% below | error | error of these 99.99% | in the recipe |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["bulk_error"])[:most]:
        how = "dynamic" if row["dynamic"] else "static"
        lines.append(_line(f"layer {row['site']}", row, how))
    for kind in KINDS.values():
        own = [row for row in rows if row["kind"] == kind]
        middle = {
            k: float(np.median([row[k] for row in own]))
            for k in ("peak", "percentile", "error", "bulk_error")
        }
        left = sum(row["dynamic"] for row in own)
        lines.append(_line(f"{kind}, median of {len(own)}", middle, f"{left} dynamic"))
    return "\n".join(lines)


def _line(name: str, row: dict[str, Any], how: str) -> str:
    peak, percentile = (f"{row[k]:.4g}" for k in ("peak", "percentile"))
    errors = f"{row['error']:.2g} | {row['bulk_error']:.2g}"
    return f"| {name} | {peak} | {percentile} | {errors} | {how} |"
