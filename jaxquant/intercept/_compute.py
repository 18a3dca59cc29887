"""What a site computes on codes: one function for each op, from its equation to `ops`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from ..ops import (
    conv_general_dilated,
    dot_general,
    gather,
    quantize_activation,
    ragged_dot as ragged_dot_of,
)
from ..qarray import QArray, transpose
from ._evaluate import plain
from ._plan import PlanError, SitePlan
from ._roles import ragged_axes

Plans = Mapping[int, SitePlan]
"""The plan of each operand that is a weight, by its side."""


def compute(eqn: Any, operands: list[Any], plans: Plans, backend: str | None) -> Any:
    """The result of a site one of whose `operands` at least is a QArray, in its traced dtype.

    **Raises:** `PlanError` where activations cannot be rounded as the plan says.
    """
    y = COMPUTE[eqn.primitive.name](eqn, operands, plans, backend)
    sharding = eqn.params.get("out_sharding")
    return y if sharding is None else jax.sharding.reshard(y, sharding)


def _take(eqn: Any, operands: list[Any], plans: Plans, backend: str | None) -> Any:
    table, indices = operands
    return gather(table, indices, **eqn.params).astype(eqn.outvars[0].aval.dtype)


def _dot(eqn: Any, operands: list[Any], plans: Plans, backend: str | None) -> Any:
    contracted, batch = eqn.params["dimension_numbers"]
    lhs, rhs = (
        _rounded(x, plans.get(1 - side), contracted[side], batch[side])
        for side, x in enumerate(operands)
    )
    return dot_general(
        lhs,
        rhs,
        (contracted, batch),
        precision=eqn.params["precision"],
        out_dtype=eqn.outvars[0].aval.dtype,
        backend=backend,
    )


def _conv(eqn: Any, operands: list[Any], plans: Plans, backend: str | None) -> Any:
    images, kernel = operands
    plan, numbers = plans.get(1), eqn.params["dimension_numbers"]
    if plan and plan.activations and plan.activations.tile.contracted is not None:
        raise PlanError(
            f"The activations of {plan.site} cannot be rounded as {plan.activations}: the windows "
            "of a convolution overlap, so that they take one scale an image or one in all. Give "
            "convolutions a rule of their own, with such a tile."
        )
    settings = {name: eqn.params[name] for name in CONV_SETTINGS}
    return conv_general_dilated(
        _rounded(images, plan, numbers.lhs_spec[1:], ()),
        kernel,
        **settings,
        out_dtype=eqn.outvars[0].aval.dtype,
        backend=backend,
    )


CONV_SETTINGS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
    "precision",
)


def _ragged_dot(eqn: Any, operands: list[Any], plans: Plans, backend: str | None) -> Any:
    axes = ragged_axes(eqn)
    if isinstance(axes, str):
        # Only a derivative rule gets here: a site of this kind is refused in the plan.
        return eqn.primitive.bind(*map(plain, operands), **eqn.params)
    rows, experts, sizes = operands
    rows = _rounded(rows, plans.get(1), (axes[0][1],), ())
    return ragged_dot_of(
        _moved(rows, axes[0]),
        _moved(experts, axes[1]),
        sizes,
        precision=eqn.params["precision"],
        out_dtype=eqn.outvars[0].aval.dtype,
        backend=backend,
    )


COMPUTE: dict[str, Callable[[Any, list[Any], Plans, str | None], Any]] = {
    "gather": _take,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
}


def _rounded(
    x: Any, plan: SitePlan | None, contracted: tuple[int, ...], stack: tuple[int, ...]
) -> Any:
    """What the weight of `plan` is multiplied with, rounded if the plan says so."""
    if plan is None or plan.activations is None or isinstance(x, QArray):
        return x
    try:
        return quantize_activation(x, plan.activations, contracted=contracted, stack=stack)
    except ValueError as error:
        raise PlanError(f"The activations of {plan.site} cannot be rounded: {error}") from error


def _moved(x: Any, axes: tuple[int, ...]) -> Any:
    if axes == tuple(range(len(axes))):
        return x
    return transpose(x, axes) if isinstance(x, QArray) else x.transpose(axes)
