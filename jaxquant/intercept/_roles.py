"""Which role each axis of a weight plays at a site, or why it can have none there."""

import math
from typing import Any

from ._weight import roles, Weight

Roles = tuple[str, ...]


def site_roles(weight: Weight, eqn: Any, op: str, side: int) -> Roles | str:
    """The role of each stored axis of `weight`, operand `side` of `eqn`; a string says why not."""
    if weight.via is not None:
        return f"it reads {weight.path} only through `{weight.via}`"
    if op == "dot":
        contracted, batch = eqn.params["dimension_numbers"]
        return roles(weight, contracted[side], batch[side])
    if op == "take":
        if side != 0:
            return "the weight is used as positions, not as a table"
        sizes = eqn.params["slice_sizes"]
        return roles(weight, [a for a, n in enumerate(weight.shape) if sizes[a] == n], ())
    if op == "conv":
        return _conv_roles(weight, eqn, side)
    return _ragged_roles(weight, eqn, side)


def _conv_roles(weight: Weight, eqn: Any, side: int) -> Roles | str:
    """Spatial axes and input features are summed, output features kept.

    A `vmap` merges its axis into the output features, in front, and counts it as feature groups:
    each of these is a convolution of its own, hence a stack.
    """
    if side != 1:
        return "the weight is what is convolved, not the kernel"
    outputs, *summed = eqn.params["dimension_numbers"].rhs_spec
    stored, groups = weight.axes[outputs], eqn.params["feature_group_count"]
    if len(stored) > 1 and all(weight.stored[s] > 1 for s in stored):
        *leading, last = stored
        if groups % math.prod(weight.stored[s] for s in leading) == 0:
            split = (*weight.axes[:outputs], (last,), *weight.axes[outputs + 1 :])
            return roles(weight.view(weight.value, split), summed, ())
    return roles(weight, summed, ())


def _ragged_roles(weight: Weight, eqn: Any, side: int) -> Roles | str:
    """Experts are batch axes: each is a matrix of its own."""
    if side == 0:
        return "the weight's own rows are dealt out to experts"
    if side == 2:
        return "the weight is used as group sizes"
    axes = ragged_axes(eqn)
    if isinstance(axes, str):
        return axes
    experts, contracted, _ = axes[1]
    return roles(weight, (contracted,), (experts,))


def ragged_axes(eqn: Any) -> tuple[tuple[int, int], tuple[int, int, int]] | str:
    """Rows and contracted axis of the left side; experts, contracted and kept axis of the right.

    A string says why the equation is not what `jax.lax.ragged_dot` computes: `ragged_dot_general`
    has batch axes, groups of the contracted axis, and offsets too.
    """
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (left, right), batch = numbers.dot_dimension_numbers
    rows, experts = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if eqn.params["group_offset"] is not None or len(eqn.invars) != 3:
        return "ragged_dot with a group offset is not computed on codes"
    shapes = [len(v.aval.shape) for v in eqn.invars]
    if any(batch) or shapes != [2, 3, 1] or len(left) != 1 or len(experts) != 1:
        return "ragged_dot_general is computed on codes as rows by experts only, without batch axes"
    kept = 3 - experts[0] - right[0]
    return (int(rows[0]), int(left[0])), (int(experts[0]), int(right[0]), int(kept))
