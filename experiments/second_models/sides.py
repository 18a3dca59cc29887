"""A Linen model by one recipe after the other."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.calibrate import calibrate, Calibrated
from jaxquant.models import variables_inventory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One recipe's model: arguments to outputs, compiled at the first call."""

    name: str
    bits: float  # A parameter, of all: scales, and what is left in float32, included.
    sites: int
    call: Callable[..., Any]
    made: Calibrated | None = None  # Where data was needed.


def sides_of(
    model: Any,
    variables: Any,
    recipes: Sequence[jq.Recipe],
    *args: Any,
    batches: Sequence[tuple[Any, ...]] = (),
    **options: Any,
) -> Iterator[Side]:
    """float32 first, then each recipe; `args` are an example, `options` go to `apply`.

    `batches` are what recipes that need data are calibrated on.
    """
    apply = jax.jit(lambda v, *now: model.apply(v, *now, **options))
    yield Side(name="float32", bits=32.0, sites=0, call=lambda *now: apply(variables, *now))
    for recipe in recipes:
        plan, made = jq.plan(model, variables, *args, recipe=recipe, **options), None
        if any(site.algorithm is not None or site.scaling is not None for site in plan.sites):
            made = calibrate(model, variables, batches, plan)
        held = jq.quantize(variables, plan) if made is None else made.qvariables
        bits = variables_inventory(held).bits_per_weight
        held, wrapped = jq.prepare(held, plan), jq.wrap(model, plan)
        compiled = jax.jit(lambda v, *now, wrapped=wrapped: wrapped.apply(v, *now, **options))
        yield Side(
            name=recipe.name,
            bits=bits,
            sites=sum(site.weights is not None for site in plan.sites),
            call=lambda *now, compiled=compiled, held=held: compiled(held, *now),
            made=made,
        )


def batched(call: Callable[..., Any], batch: int, *arrays: np.ndarray) -> np.ndarray:
    """`call` on `batch` rows at a time; the last batch is filled up, so that one program serves."""
    outs = []
    for at in range(0, len(arrays[0]), batch):
        part = [array[at : at + batch] for array in arrays]
        short = batch - len(part[0])
        part = [np.concatenate([x, np.repeat(x[:1], short, axis=0)]) for x in part]
        out = np.asarray(call(*(jnp.asarray(x) for x in part)))
        outs.append(out[: batch - short])
    return np.concatenate(outs)


def show(title: str, rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> None:
    """A table of `rows`; `columns` are their formats by key."""
    print(f"\n{title}")
    widths = {key: max(12, len(key)) for key in columns}
    print(" ".join(f"{key:>{width}}" for key, width in widths.items()))
    for row in rows:
        cells = (f"{format(row[key], spec):>{widths[key]}}" for key, spec in columns.items())
        print(" ".join(cells), flush=True)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._start
