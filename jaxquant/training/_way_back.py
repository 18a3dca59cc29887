"""Products of the way back in codes: training in few bits, after NVIDIA's and DeepSeek's recipes.

Of `y = x w` there are two. The gradient of the inputs, `dx = dy w^T`, sums over the outputs of the
weight; that of the weight, `dw = x^T dy`, over the rows of `x` (tokens). Scales can only be taken
out of a sum where they are constant along it, so that every operand is rounded along the axis that
its product sums over: inputs and gradients twice, in tiles that lie across each other. Where a tile
looks the same either way (one scale in all, square blocks), so do the codes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ..ops import dot_general
from ..qarray import (
    dequantize,
    PER_TENSOR,
    QArray,
    quantize_array,
    reshape,
    Scheme,
    transpose,
)
from ..qarray._quantize import quantize_with
from ._delayed import peak_of
from ._estimators import Delayed

RESIDUAL = "jaxquant_residual"
"""The name, for policies of `jax.checkpoint`, of the codes that are kept for the way back."""

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WayBack:
    """That both products of the way back are products of codes; `gradients` is the scheme of `dy`.

    Inputs and weights have the schemes of their rule, along other axes: what its tiles call
    contracted is what each product sums over. Weights are rounded from their values, and so are
    inputs, while they are at hand; with `from_codes` inputs are rounded once more from their codes
    of the way there, which are then all that is kept of them (DeepSeek-V3, arXiv:2412.19437,
    section 3.3). Either way what is kept of inputs is codes. With `scaling` the scale of gradients,
    one in all, comes from earlier steps.
    """

    gradients: Scheme
    from_codes: bool = False
    scaling: Delayed | None = None

    def check(self, weights: Scheme, activations: Scheme | None) -> str | None:
        """Why this does not fit the schemes of a rule, or `None`."""
        if activations is None:
            return "products of codes have codes on both sides; give the rule activations"
        for what, scheme in (
            ("weights", weights),
            ("activations", activations),
            ("gradients", self.gradients),
        ):
            if scheme.zero_point is not None or scheme.centered:
                return f"the {what} ({scheme}) have zero points or a mean apart; leave these out"
        kinds = {s.values.integer for s in (weights, activations, self.gradients)}
        if len(kinds) > 1:
            return "integers and floats do not multiply each other; give all three one kind"
        if self.scaling is not None and self.gradients.tile != PER_TENSOR:
            return f"gradients by {self.scaling} have one scale in all; give them PER_TENSOR"
        return None

    @property
    def held(self) -> tuple[str, ...]:
        """The names of what a site holds for this, from step to step."""
        return () if self.scaling is None else ("gradient_scale", "gradient_peaks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dot:
    """What is known of a product beside its operands: nothing of it is traced.

    `numbers` are those of `dot_general`; `shapes`, `dtypes` and `schemes` those of what gradients
    reach on each side, and of its codes; `inputs` says which side they are.
    """

    numbers: tuple[tuple[Axes, Axes], tuple[Axes, Axes]]
    shapes: tuple[Axes, Axes]
    dtypes: tuple[Any, Any]
    schemes: tuple[Scheme, Scheme]
    inputs: int
    back: WayBack
    precision: Any = None
    backend: str | None = None

    def order(self, side: int, ndim: int) -> tuple[Axes, Axes, Axes]:
        """An operand's axes by role: batched, free, and summed; these in order of their pairs."""
        summed, batch = (tuple(axes[side]) for axes in self.numbers)
        return batch, tuple(a for a in range(ndim) if a not in summed and a not in batch), summed

    def matrix(self, side: int, x: Any) -> Any:
        """An operand as `[*batch, rows, k]`, the weight as `[*batch, k, n]`."""
        batch, free, summed = self.order(side, x.ndim)
        return _merged(x, batch, *((free, summed) if side == self.inputs else (summed, free)))

    def unmerged(self, side: int, x: Any, shape: Axes) -> Any:
        """The inverse of `matrix`, for an operand of `shape`."""
        batch, free, summed = self.order(side, len(shape))
        places = (*batch, *((*free, *summed) if side == self.inputs else (*summed, *free)))
        x = x.reshape([shape[a] for a in places])
        return x.transpose(sorted(range(len(places)), key=places.__getitem__))


def _merged(x: Any, batch: Axes, first: Axes, second: Axes) -> Any:
    """An array or QArray with its axes in this order, those of each group but the batched one."""
    order = (*batch, *first, *second)
    sizes = (math.prod(x.shape[a] for a in axes) for axes in (first, second))
    shape = (*(x.shape[a] for a in batch), *sizes)
    if order != tuple(range(x.ndim)):
        x = transpose(x, order) if isinstance(x, QArray) else x.transpose(order)
    if tuple(x.shape) == shape:
        return x
    return reshape(x, shape) if isinstance(x, QArray) else x.reshape(shape)


def same_either_way(scheme: Scheme) -> bool:
    """Whether tiles do not tell summed axes from kept ones, so that one set of codes does."""
    return scheme.tile.contracted == scheme.tile.kept


def in_codes(
    compute: Callable[..., Any],
    dot: Dot,
    anchors: Sequence[Any],
    held: Sequence[Any],
    scale: Float[Array, "*batch 1"] | None = None,
    seen: Float[Array, "*batch 2"] | None = None,
) -> Float[Array, "..."]:
    """`compute(held)`, whose two products of the way back are computed on codes as well.

    `held` are two QArrays and `anchors` the arrays that gradients reach. `compute` closes over
    nothing that is traced. `scale` is that of the gradient that arrives; without it the gradient
    has scales of its own. The "gradient" of `seen` are the largest magnitudes that this call saw:
    of its inputs, and of the gradient that arrived.
    """
    return _in_codes(compute, dot, tuple(anchors), tuple(held), scale, seen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_codes(compute: Any, dot: Dot, anchors: Any, held: Any, scale: Any, seen: Any) -> Any:
    return compute(held)


def _forward(
    compute: Any, dot: Dot, anchors: Any, held: Any, scale: Any, seen: Any
) -> tuple[Any, Any]:
    side = dot.inputs
    x, w = dot.matrix(side, anchors[side]), held[1 - side]
    kept = (
        dot.matrix(side, held[side])
        if dot.back.from_codes or same_either_way(dot.schemes[side])
        else _across(x, dot.schemes[side])
    )
    kept = jax.tree.map(lambda part: checkpoint_name(part, RESIDUAL), kept)
    # A weight whose codes do not serve is kept itself: it is a parameter, and there anyway.
    weight = dot.matrix(
        1 - side, w if same_either_way(dot.schemes[1 - side]) else anchors[1 - side]
    )
    peak = None if seen is None else peak_of(x, tuple(range(x.ndim - 2)))
    return compute(held), (kept, weight, scale, peak, seen)


def _across(x: Any, scheme: Scheme, axis: int = -2) -> QArray:
    """Codes of a matrix whose sums will be over `axis`; other axes before both are batched."""
    return quantize_array(x, scheme, contracted=(axis,), stack=tuple(range(x.ndim - 2)))


def _backward(compute: Any, dot: Dot, kept: Any, g: Any) -> tuple[Any, ...]:
    x, w, scale, peak, seen = kept
    side, gradients = dot.inputs, dot.back.gradients
    if dot.back.from_codes and not same_either_way(x.scheme):
        x = _across(dequantize(x, jnp.float32), dot.schemes[side])
    if not isinstance(w, QArray):
        w = _across(w, dot.schemes[1 - side], -1)
    shapes = dot.shapes
    lead = x.ndim - 2
    batch = tuple(range(lead))
    count = len(dot.order(0, len(shapes[0]))[1])
    sides = tuple(range(lead, lead + count)), tuple(range(lead + count, g.ndim))
    g = _merged(g, batch, sides[side], sides[1 - side])
    if scale is not None:
        scale = scale[..., None]
        # Clipped, infinity would look like any number to those that it is passed on to.
        g = jnp.where(jnp.isinf(g), jnp.nan, g)
        over = back = quantize_with(g, gradients, scale, contracted=(-1,), stack=batch)
    else:
        over = _across(g, gradients, -1)
        back = over if same_either_way(gradients) else _across(g, gradients)
    product = functools.partial(dot_general, precision=dot.precision, backend=dot.backend)
    numbers = (((lead + 1,), (lead + 1,)), (batch, batch))
    dx = product(over, w, numbers, out_dtype=dot.dtypes[side])
    numbers = (((lead,), (lead,)), (batch, batch))
    dw = product(x, back, numbers, out_dtype=dot.dtypes[1 - side])
    found = [dot.unmerged(side, dx, shapes[side]), dot.unmerged(1 - side, dw, shapes[1 - side])]
    if seen is not None:
        assert peak is not None
        seen = _over_devices(jnp.concatenate([peak, peak_of(g, batch)], axis=-1), seen)
    still = None if scale is None else jnp.zeros_like(scale[..., 0])
    return tuple(found if side == 0 else reversed(found)), None, still, seen


_in_codes.defvjp(_forward, _backward)


def _over_devices(peaks: Any, like: Any) -> Any:
    """The largest of all devices of a `shard_map` that share `like`."""
    apart, shared = (jax.typeof(x).manual_axis_type.varying for x in (peaks, like))
    axes = tuple(apart - shared)
    return jax.lax.pmax(peaks, axes) if axes else peaks
