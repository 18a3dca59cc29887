"""One large weight to codes: how much of a plain copy's speed is left."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..algorithms import quantize
from ..evaluate import Timing
from ..intercept import plan as make_plan, Recipe, Rule
from ..numerics import INT4, INT8
from ..qarray import PER_CHANNEL, Scheme, schemes, Tile
from ._console import table

COPY = "copy"
SIZE = 16384
"""Both sides of the weight: 1.07 GB of float32."""
SCHEMES = {
    "int8 channel": Scheme(values=INT8, tile=PER_CHANNEL),
    "int4 g64": Scheme(values=INT4, tile=Tile(contracted=64)),
    "nf4": schemes.NF4,
    "mxfp4": schemes.MXFP4,
}


def quantize_sides(size: int) -> dict[str, Callable[[], Any]]:
    """A copy of a float32 weight, and `quantize` of it by each scheme, all from the same array."""
    if size % 64:
        raise ValueError(f"--size {size} is not a multiple of 64, which groups of 64 have to fill.")
    w = jax.random.normal(jax.random.key(0), (size, size))
    variables = {"params": {"kernel": w}}
    copy = jax.jit(jnp.copy)
    sides: dict[str, Callable[[], Any]] = {COPY: lambda: copy(w)}
    for name, scheme in SCHEMES.items():
        recipe = Recipe(name=name, rules=(Rule(match="*", weights=scheme),))
        x = jax.ShapeDtypeStruct((1, size), jnp.float32)
        plan = make_plan(nn.Dense(size, use_bias=False), variables, x, recipe=recipe)
        sides[name] = lambda plan=plan: jax.tree.leaves(quantize(variables, plan))
    return sides


def throughput_rows(timings: dict[str, Timing], size: int) -> list[dict[str, Any]]:
    """For each side: median, GB of float32 read a second, and the ratio to the copy's speed."""
    copy = timings[COPY]
    return [
        {
            "name": name,
            "median_seconds": timing.median,
            "gigabytes_per_second": 4e-9 * size * size / timing.median,
            "ratio": timing.ratio(copy),
            "seconds": list(timing.seconds),
        }
        for name, timing in timings.items()
    ]


def throughput_table(rows: list[dict[str, Any]]) -> Any:
    """What `throughput_rows` gave, as a table; the spread is that of the rounds."""
    made = table("side", "median", "least", "most", "GB/s read", f"speed / {COPY}")
    for row in rows:
        made.add_row(
            row["name"],
            f"{1e3 * row['median_seconds']:.0f} ms",
            f"{1e3 * min(row['seconds']):.0f} ms",
            f"{1e3 * max(row['seconds']):.0f} ms",
            f"{row['gigabytes_per_second']:.2f}",
            f"{row['ratio']:.2f}",
        )
    return made
