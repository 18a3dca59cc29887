"""Adapters of a site: arrays beside a frozen weight, found by rule, as state of the site."""

import math
import zlib
from typing import Any

import jax
from jax import lax

from ..qarray import QArray
from ._conditioned import Met
from ._joined import plain
from ._plan import Plan
from ._variables import stamped, states_of, unstamped
from ._weight import Weight

ADAPTER = frozenset({"lora_a", "lora_b"})
"""The names of an adapter's arrays in the state of its site."""


def add_adapters(qvariables: Any, plan: Plan, key: Any) -> Any:
    """The variables with adapters at the sites whose rule has some; nothing is computed otherwise.

    They are float32 arrays `lora_a` and `lora_b` in the collection `jaxquant`, and alone trainable
    with `jaxquant.partition(qvariables, match="jaxquant/*")`. `key` is of `jax.random`.

    ```python
    qvariables = jq.add_adapters(jq.quantize(variables, plan), plan, jax.random.key(0))
    adapters, frozen = jq.partition(qvariables, match="jaxquant/*")
    ```

    **Raises:** `ValueError` if no rule has an adapter.
    """
    variables, fingerprint = unstamped(qvariables)
    states = states_of(qvariables)
    adapted = [site for site in plan.sites if site.adapter is not None]
    if not adapted or fingerprint is None:
        raise ValueError(
            f"No site of the plan {plan.fingerprint} has an adapter. Name some by a rule: "
            "Rule(match=..., weights=..., adapter=LoRA(rank=16))."
        )
    for site in adapted:
        stack, k, n = plan.by_path[site.path].matrix
        own = jax.random.fold_in(key, zlib.crc32(site.site.encode()))
        assert site.adapter is not None
        made = site.adapter.start(own, stack=stack, k=k, n=n)
        states[site.site] = {**states.get(site.site, {}), **made}
    return stamped(variables, fingerprint, states)


def adapted(y: Any, x: Any, weight: Weight, side: int, met: Met, eqn: Any) -> Any:
    """The result of a dot with what its adapter adds; `weight` is operand `side`, `x` the other."""
    adapter = met.plan.adapter
    if adapter is None or "lora_a" not in met.state or isinstance(x, QArray):
        return y
    contracted, batch = eqn.params["dimension_numbers"]
    own, theirs = 1 - side, side
    x = plain(x)
    summed, batched = met.summed(contracted[own]), tuple(batch[own])
    free = [a for a in range(x.ndim) if a not in summed and a not in batched]
    moved = x.transpose((*batched, *free, *summed))
    lead, rows = moved.shape[: len(batched)], moved.shape[len(batched) : len(batched) + len(free)]
    k = math.prod(moved.shape[len(batched) + len(free) :])
    a, b = met.state["lora_a"], met.state["lora_b"]
    z = adapter.product(moved.reshape(*lead, math.prod(rows), k), a, b)
    taken = (*contracted[theirs], *batch[theirs])
    kept = [axis for axis in range(weight.ndim) if axis not in taken]
    # Outputs are flattened as the parameter stores them.
    stored = sorted(kept, key=lambda axis: weight.axes[axis] or (len(weight.stored),))
    z = z.reshape(*lead, *rows, *(weight.shape[axis] for axis in stored))
    first = len(lead) + len(rows)
    z = z.transpose((*range(first), *(first + stored.index(axis) for axis in kept)))
    if side == 0:
        order = (*range(len(lead)), *range(first, z.ndim), *range(len(lead), first))
        z = lax.transpose(z, order)
    return y + z.astype(y.dtype)
