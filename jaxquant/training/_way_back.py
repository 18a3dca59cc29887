"""Products of the way back in codes: training in few bits, after NVIDIA's and DeepSeek's recipes.

Of `y = x w` there are two. The gradient of the inputs, `dx = dy w^T`, sums over the outputs of the
weight; that of the weight, `dw = x^T dy`, over the rows of `x` (tokens). Scales can only be taken
out of a sum where they are constant along it, so that every operand is rounded along the axis that
its product sums over: inputs and gradients twice, in tiles that lie across each other. Where a tile
looks the same either way (one scale in all, square blocks), so do the codes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ..ops import dot_general
from ..qarray import dequantize, PER_TENSOR, QArray, quantize_array, Scheme
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

    `numbers` are those of `dot_general`; `schemes` and `dtypes` those of its sides, and of what
    gradients reach there; `inputs` says which side they are.
    """

    numbers: tuple[tuple[Axes, Axes], tuple[Axes, Axes]]
    schemes: tuple[Scheme, Scheme]
    dtypes: tuple[Any, Any]
    inputs: int
    back: WayBack
    precision: Any = None
    backend: str | None = None

    def free(self, side: int, ndim: int) -> Axes:
        """The axes of an operand that are axes of the result too, but for batched ones."""
        summed, batch = (axes[side] for axes in self.numbers)
        return tuple(a for a in range(ndim) if a not in summed and a not in batch)


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
    kept = tuple(_kept(dot, side, anchors[side], held[side]) for side in (0, 1))
    peak = None if seen is None else peak_of(anchors[dot.inputs], dot.numbers[1][dot.inputs])
    return compute(held), (kept, scale, peak)


def _kept(dot: Dot, side: int, x: Any, q: QArray) -> Any:
    """An operand for the way back: codes, or a weight itself, which is held as a parameter anyway.

    Those of inputs lie along rows, unless they are made so later.
    """
    if side == dot.inputs and not (same_either_way(q.scheme) or dot.back.from_codes):
        q = _across(dot, side, x)
    elif side != dot.inputs and not same_either_way(q.scheme):
        return x
    return jax.tree.map(lambda part: checkpoint_name(part, RESIDUAL), q)


def _across(dot: Dot, side: int, x: Any) -> QArray:
    """Codes of an operand along the axes that the way there keeps, and the way back sums over."""
    free, stack = dot.free(side, x.ndim), dot.numbers[1][side]
    return quantize_array(x, dot.schemes[side], contracted=free, stack=stack)


def _backward(compute: Any, dot: Dot, kept: Any, g: Any) -> tuple[Any, ...]:
    held, scale, peak = kept
    operands = list(held)
    for side, x in enumerate(held):
        if not isinstance(x, QArray):
            operands[side] = _across(dot, side, x)
        elif side == dot.inputs and dot.back.from_codes and not same_either_way(x.scheme):
            operands[side] = _across(dot, side, dequantize(x, jnp.float32))
    found = tuple(transposed(dot, g, operands, side, scale) for side in (0, 1))
    stack = tuple(range(len(dot.numbers[1][0])))
    seen = None if peak is None else jnp.concatenate([peak, peak_of(g, stack)], axis=-1)
    return found, None, None if scale is None else jnp.zeros_like(scale), seen


_in_codes.defvjp(_forward, _backward)


def transposed(
    dot: Dot, g: Float[Array, "..."], operands: Sequence[QArray], side: int, scale: Any = None
) -> Float[Array, "..."]:
    """The gradient of operand `side`: `g` by the other operand, both as codes."""
    (summed, batch), other = dot.numbers, operands[1 - side]
    frees = [dot.free(each, x.ndim) for each, x in enumerate(operands)]
    stack = tuple(range(len(batch[0])))
    first = len(stack) + (0 if side == 1 else len(frees[0]))
    over = tuple(range(first, first + len(frees[1 - side])))
    roles: Any = {"contracted": over, "stack": stack}
    if scale is None:
        q = quantize_array(g, dot.back.gradients, **roles)
    else:
        scale = scale.reshape(*scale.shape[:-1], *(1 for _ in range(g.ndim - len(stack))))
        q = quantize_with(g, dot.back.gradients, scale, **roles)
    sides = [(q, over, stack), (other, frees[1 - side], batch[1 - side])]
    # Axes of the result: the batched ones, the free ones, and those that were summed, as `other`
    # has them from first to last; or these before those, if that spares a transpose.
    partners = dict(zip(summed[1 - side], summed[side], strict=True))
    found = [frees[side], tuple(partners[a] for a in sorted(partners))]
    if found[1] < found[0]:
        sides.reverse()
        found.reverse()
    (left, left_over, left_stack), (right, right_over, right_stack) = sides
    y = dot_general(
        left,
        right,
        ((left_over, right_over), (left_stack, right_stack)),
        precision=dot.precision,
        out_dtype=dot.dtypes[side],
        backend=dot.backend,
    )
    places = (*batch[side], *found[0], *found[1])
    return y.transpose(tuple(int(i) for i in np.argsort(places)))
