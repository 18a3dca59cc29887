"""What a site computes on codes: one function for each op, from its equation to `ops`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ..ops import (
    conv_general_dilated,
    dot_with_outliers,
    gather,
    OutlierWeights,
    ragged_dot,
)
from ..ops.dot import KERNELS, preferred_backend
from ..qarray import QArray, Scheme, transpose
from ._conditioned import conditioned, dynamic, Met, static
from ._explicit import typed
from ._joined import plain, Sliced
from ._plan import PlanError
from ._products import dot_of_codes
from ._roles import ragged_axes

Plans = Mapping[int, Met]
"""The plan of each operand that is a weight, with its state, by its side."""


def compute(eqn: Any, operands: list[Any], plans: Plans, backend: str | None) -> Any:
    """The result of a site one of whose `operands` at least is a QArray, in its traced dtype.

    **Raises:** `PlanError` where activations cannot be rounded as the plan says.
    """
    return COMPUTE[eqn.primitive.name](eqn, operands, plans, backend)


def _typed(eqn: Any, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` with the sharding that the equation has, where that is part of a type."""
    y = typed(function, eqn.outvars[0].aval.sharding, *args)
    sharding = eqn.params.get("out_sharding")
    return y if sharding is None else jax.sharding.reshard(y, sharding)


def _take(eqn: Any, operands: list[Any], plans: Plans, backend: str | None) -> Any:
    def rows(table: QArray, indices: Any) -> Any:
        return gather(table, indices, **eqn.params).astype(eqn.outvars[0].aval.dtype)

    return _typed(eqn, rows, *operands)


def _dot(eqn: Any, operands: list[Any], plans: Plans, backend: str | None) -> Any:
    contracted, batch = eqn.params["dimension_numbers"]
    for side, met in plans.items():
        if met.plan.outliers is not None and not isinstance(operands[1 - side], QArray):
            return _with_outliers(eqn, operands, side, met, backend)
    # Of two weights the right one is the one that kernels read as such.
    met = plans.get(1) or plans.get(0)
    inside = None if met is None else _rounded_inside(operands, met, backend)
    lhs, rhs = (
        _rounded(x, plans.get(1 - side), contracted[side], batch[side], inside is None)
        for side, x in enumerate(operands)
    )
    return dot_of_codes(lhs, rhs, eqn, backend, met, activations=inside)


def _rounded_inside(operands: list[Any], met: Met, backend: str | None) -> Scheme | None:
    """The scheme of activations that the product itself is left to round, for kernels that do."""
    one = sum(isinstance(x, QArray) for x in operands) == 1
    if not one or met.plan.static or any(isinstance(x, Sliced) for x in operands):
        return None
    return met.plan.activations if (backend or preferred_backend()) in KERNELS else None


def _with_outliers(eqn: Any, operands: list[Any], side: int, met: Met, backend: str | None) -> Any:
    """A product whose outliers are kept apart; `side` is that of the weight."""
    contracted, batch = eqn.params["dimension_numbers"]
    outliers, scheme = met.plan.outliers, met.plan.activations
    assert outliers is not None and scheme is not None
    summed = [met.summed(axes) for axes in contracted]
    x = operands[1 - side]
    x = plain(conditioned(x, met, summed[1 - side], tuple(batch[1 - side])))
    pair = [operands[side], x] if side == 0 else [x, operands[side]]
    original = outliers.weights is OutlierWeights.ORIGINAL
    known = [met.state[name] for name in ("outlier_columns", "outlier_weights") if original]

    def product(lhs: Any, rhs: Any, *known: Any) -> Any:
        columns, originals = known or (None, None)
        return dot_with_outliers(
            lhs,
            rhs,
            ((summed[0], summed[1]), (tuple(batch[0]), tuple(batch[1]))),
            activations=scheme,
            outliers=outliers,
            columns=columns,
            originals=originals,
            precision=eqn.params["precision"],
            out_dtype=eqn.outvars[0].aval.dtype,
            backend="reference" if backend == "reference" else None,
        )

    try:
        return _typed(eqn, product, *pair, *known)
    except ValueError as error:
        raise PlanError(f"{met.plan.site} cannot be computed as planned: {error}") from error


def _conv(eqn: Any, operands: list[Any], plans: Plans, backend: str | None) -> Any:
    images, kernel = operands
    met, numbers = plans.get(1), eqn.params["dimension_numbers"]
    plan = None if met is None else met.plan
    if plan and plan.activations and plan.activations.tile.contracted is not None:
        raise PlanError(
            f"The activations of {plan.site} cannot be rounded as {plan.activations}: the windows "
            "of a convolution overlap, so that they take one scale an image or one in all. Give "
            "convolutions a rule of their own, with such a tile."
        )
    convolution = functools.partial(
        conv_general_dilated,
        **{name: eqn.params[name] for name in CONV_SETTINGS},
        out_dtype=eqn.outvars[0].aval.dtype,
        backend=backend,
    )
    return _typed(eqn, convolution, _rounded(images, met, numbers.lhs_spec[1:], ()), kernel)


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
    product = functools.partial(
        ragged_dot,
        precision=eqn.params["precision"],
        out_dtype=eqn.outvars[0].aval.dtype,
        backend=backend,
    )
    return _typed(eqn, product, _moved(rows, axes[0]), _moved(experts, axes[1]), sizes)


COMPUTE: dict[str, Callable[[Any, list[Any], Plans, str | None], Any]] = {
    "gather": _take,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
}


def _rounded(
    x: Any,
    met: Met | None,
    contracted: tuple[int, ...],
    batch: tuple[int, ...],
    here: bool = True,
) -> Any:
    """What a weight is multiplied with: after what its site's state does, rounded if planned.

    It is rounded `here`, unless the product does that.
    """
    if met is None or isinstance(x, QArray):
        return plain(x) if isinstance(x, Sliced) else x
    site, scheme = met.plan.site, met.plan.activations
    summed, batch = met.summed(contracted), tuple(batch)
    x = conditioned(x, met, summed, batch)
    if scheme is None or not here:
        return plain(x) if isinstance(x, Sliced) else x
    try:
        if met.plan.static:
            return static(x, met, summed, batch)
        return dynamic(x, scheme, tuple(contracted), batch)
    except ValueError as error:
        raise PlanError(f"The activations of {site} cannot be rounded: {error}") from error


def _moved(x: Any, axes: tuple[int, ...]) -> Any:
    if axes == tuple(range(len(axes))):
        return x
    return transpose(x, axes) if isinstance(x, QArray) else x.transpose(axes)
