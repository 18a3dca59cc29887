"""What the state of a site does with its inputs: divided, put in another order, rounded as planned.

`summed` are the axes of the inputs that are contracted, in the order in which their weight stores
their partners; `batch` those that are batched, in the order of the state's leading axes.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Shaped

from ..ops import quantize_static
from ..ops.dot import Layer
from ..qarray import QArray, Scheme
from ._choices import Choices
from ._explicit import typed_like
from ._joined import plain, rounded
from ._plan import PlanError, SitePlan

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Met:
    """A site where it is met: its plan, its state there, and the order of the axes it sums over.

    `order` sorts the contracted pairs of axes as the weight stores them. `sharding` is how the
    weight lies on a mesh, where known; `choices` notes by what the site is computed; `layer` is
    where the weight lies in a stack.
    """

    plan: SitePlan
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    order: tuple[int, ...] | None = None
    sharding: NamedSharding | None = None
    choices: Choices | None = None
    layer: Layer | None = None

    def without_state(self) -> "Met":
        """What of it is known without data: nothing that is traced."""
        return Met(plan=self.plan, order=self.order, sharding=self.sharding, choices=self.choices)

    def summed(self, axes: Axes) -> Axes:
        """The inputs' contracted `axes`, in the weight's stored order."""
        return tuple(axes) if self.order is None else tuple(axes[i] for i in self.order)


def conditioned(x: Any, met: Met, summed: Axes, batch: Axes) -> Any:
    """`x` divided and in the order of the codes, in its own dtype; `x` itself without such state.

    What was cut for a part of a weight is conditioned as that part.
    """
    smoothing, permutation = met.state.get("smoothing"), met.state.get("permutation")
    if smoothing is None and permutation is None:
        return x
    x = plain(x)
    if smoothing is not None:
        part = along(smoothing, x, summed, batch)
        x = (x.astype(jnp.float32) / part.astype(jnp.float32)).astype(x.dtype)
    if permutation is not None:
        x = _permuted(x, permutation, summed, batch)
    return x


def static(x: Any, met: Met, summed: Axes, batch: Axes) -> QArray:
    """`x` rounded with the scales that calibration fixed.

    **Raises:** `PlanError` where scales have several tiles along several contracted axes.
    """
    scheme = met.plan.activations
    assert scheme is not None
    scale, zero = met.state["scale"], met.state.get("zero_point")
    if len(summed) > 1 and scale.shape[-1] != 1:
        raise PlanError(
            f"The activations of {met.plan.site} have static scales in {scale.shape[-1]} tiles "
            f"along {len(summed)} axes. Give them one scale in all: PER_TENSOR."
        )
    x = plain(x)
    scale = along(scale, x, summed, batch)
    zero = None if zero is None else along(zero, x, summed, batch)
    return typed_like(
        lambda x: quantize_static(x, scheme, scale, zero, contracted=summed, stack=batch), x
    )


def dynamic(x: Any, scheme: Scheme, summed: Axes, batch: Axes) -> QArray:
    """`x` rounded with ranges of its own."""
    return rounded(x, scheme, contracted=summed, stack=batch)


def along(part: Shaped[Array, "..."], x: Any, summed: Axes, batch: Axes) -> Shaped[Array, "..."]:
    """State with an axis for each of `x`: the batch axes, the summed ones, 1 along the others.

    Its last axis is as long as all summed axes together, or has a tile for each entry.
    """
    sizes = [x.shape[a] for a in summed]
    if part.shape[-1] != math.prod(sizes):
        sizes = [part.shape[-1], *(1 for _ in summed[1:])]
    part = part.reshape(*part.shape[:-1], *sizes)
    axes = (*batch, *summed)
    part = part.transpose(sorted(range(len(axes)), key=lambda i: axes[i]))
    return jnp.expand_dims(part, [a for a in range(x.ndim) if a not in axes])


def _permuted(
    x: Float[Array, "..."], permutation: Shaped[Array, "*stack k"], summed: Axes, batch: Axes
) -> Float[Array, "..."]:
    """`x[..., permutation]`, the summed axes being the last one."""
    if not batch and len(summed) == 1:
        return jnp.take(x, permutation, axis=summed[0], mode="clip")
    free = [a for a in range(x.ndim) if a not in summed and a not in batch]
    order = [*batch, *free, *summed]
    moved = x.transpose(order)
    k = math.prod(moved.shape[len(batch) + len(free) :])
    rows = moved.reshape(*moved.shape[: len(batch)], -1, k)
    rows = jnp.take_along_axis(rows, permutation[..., None, :], axis=-1, mode="clip")
    return rows.reshape(moved.shape).transpose(sorted(range(x.ndim), key=lambda a: order[a]))
