"""GPTQ beside that of qwix and a PyTorch loop: one weight, one Gram matrix, seconds."""

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..algorithms import GPTQ
from ..numerics import AbsMax, Convention, INT4
from ..qarray import Scheme, Tile
from ._bench_gptq_peers import qwix_gptq, torch_gptq
from ._console import table

SHAPES = ((576, 1536), (2048, 2048))
"""Outputs and inputs: a down projection of SmolLM2, and what peers publish seconds for."""
GROUP = 64
COLUMNS = 128
"""Columns of qwix's side, which takes them one by one from Python."""
SCHEME = Scheme(
    values=INT4, tile=Tile(contracted=GROUP), range=AbsMax(convention=Convention.MIDDLE)
)
OURS, QWIX, TORCH = "jaxquant", "qwix", "PyTorch loop"


def cores() -> int:
    """The cores that this process may run on: how many threads each side has."""
    usable = getattr(os, "sched_getaffinity", None)
    return (os.cpu_count() or 1) if usable is None else len(usable(0))


def gptq_input(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight `[n, k]`, and the Gram matrix `[k, k]` of correlated inputs."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((k, k), np.float32) / np.float32(np.sqrt(k))
    x = rng.standard_normal((2 * k, k), np.float32) @ (mixing + np.eye(k, dtype=np.float32))
    return rng.standard_normal((n, k), np.float32), x.T @ x


def gptq_sides(n: int, k: int) -> dict[str, Callable[[], Any] | str]:
    """What to time, by name; a sentence for what is not there. qwix has its first columns."""
    w, gram = gptq_input(n, k)
    held, statistics = jnp.asarray(w), {"gram": jnp.asarray(gram)}
    ours = GPTQ()
    sides: dict[str, Callable[[], Any] | str] = {OURS: lambda: ours.run(held, statistics, SCHEME)}
    some = min(COLUMNS, k)
    if importlib.util.find_spec("qwix") is None:
        sides[QWIX] = "absent: pip install qwix"
    else:
        sides[QWIX] = qwix_gptq(w[:, :some], gram[:some, :some], group=GROUP)
    if importlib.util.find_spec("torch") is None:
        sides[TORCH] = "absent: pip install torch"
    else:
        sides[TORCH] = torch_gptq(w, gram, group=GROUP, threads=cores())
    return sides


def gptq_rows(
    shapes: tuple[tuple[int, int], ...], *, rounds: int, progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """For each shape and side: seconds of the first call, of later ones, and how many times those
    of jaxquant they are.

    qwix's seconds are scaled to all columns: those of a warm call in proportion, which flatters it,
    since what it does for a column grows with the columns; what its first call takes more is
    counted once.
    """
    found, turns = [], len(shapes) * (rounds + 1)
    for at, (n, k) in enumerate(shapes):
        sides = gptq_sides(n, k)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds + 1):
            for name, side in sides.items():
                if callable(side) and (name != QWIX or turn < 3):
                    start = time.perf_counter()
                    jax.block_until_ready(jax.tree.leaves(side()))
                    seconds[name].append(time.perf_counter() - start)
            progress(at * (rounds + 1) + turn + 1, turns)
        found += [_row(name, (n, k), sides[name], taken) for name, taken in seconds.items()]
        first = found[-len(sides)]
        for row in found[-len(sides) :]:
            for what in ("warm", "first"):
                known = row[f"{what}_seconds"]
                row[f"{what}_ratio"] = None if known is None else known / first[f"{what}_seconds"]
    return found


def _row(name: str, shape: tuple[int, int], side: Any, taken: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "rows": shape[0], "columns": shape[1], "said": ""}
    if not taken:
        return {**row, "said": side, "warm_seconds": None, "first_seconds": None, "seconds": []}
    warm, factor = statistics.median(taken[1:]), 1.0
    more = max(0.0, taken[0] - warm)
    if name == QWIX:
        some = min(COLUMNS, shape[1])
        factor = shape[1] / some
        row["said"] = f"{some} columns, times {factor:g}"
    warm *= factor
    return {**row, "warm_seconds": warm, "first_seconds": warm + more, "seconds": taken}


def gptq_table(rows: list[dict[str, Any]]) -> Any:
    made = table("weight", "side", "warm", "first call", "warm / ours", "first / ours", "")
    for row in rows:
        times = [_seconds(row["warm_seconds"]), _seconds(row["first_seconds"])]
        ratios = ["" if row[w] is None else f"{row[w]:.2f}" for w in ("warm_ratio", "first_ratio")]
        made.add_row(f"{row['rows']}x{row['columns']}", row["name"], *times, *ratios, row["said"])
    return made


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} s"
