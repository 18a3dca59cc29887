"""The product whose outlier columns are kept in floats: what may be called."""

from typing import Any

from jaxtyping import Array, Float, Integer

from ...qarray import QArray, Scheme
from .._dispatch import first_willing
from ..dot._api import make_call
from ..dot._call import DimensionNumbers, Operand
from . import _reference, _xla
from ._call import OutlierCall
from ._values import Outliers

BACKENDS = {"xla": _xla, "reference": _reference}


def dot_with_outliers(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    *,
    activations: Scheme,
    outliers: Outliers,
    columns: Integer[Array, "*batch m"] | None = None,
    originals: Float[Array, "*batch m n"] | None = None,
    precision: Any = None,
    out_dtype: Any = None,
    backend: str | None = None,
) -> Float[Array, "..."]:
    """`dot_general` of activations, rounded but for their outlier columns, with a QArray.

    One side is a QArray, the weight; the other is rounded by `activations`. Its columns (places
    along the contracted axes) in which some element reaches `outliers.threshold` are multiplied as
    they are: with `originals` where `columns` holds their place, else with what the weight's codes
    stand for. Scales are those of the elements that do not reach it, outlier columns or not.
    Places count the contracted axes flattened in the order of `dimension_numbers`, one past the end
    is none; `n` are the weight's free axes, flattened. `backend` forces `xla` or `reference`.

    **Raises:** `ValueError` if not exactly one side is a QArray, or the originals do not fit it;
    `TypeError` when differentiated by the activations.
    """
    if isinstance(lhs, QArray) == isinstance(rhs, QArray):
        raise ValueError(
            "One side is the weight, a QArray, and the other the activations, which are not "
            f"rounded yet; got {type(lhs).__name__} and {type(rhs).__name__}."
        )
    if (columns is None) != (originals is None):
        raise ValueError("Original weights belong to columns: give both, or neither.")
    dot = make_call(lhs, rhs, dimension_numbers, precision=precision, out_dtype=out_dtype)
    call = OutlierCall(
        dot=dot, activations=activations, outliers=outliers, columns=columns, originals=originals
    )
    if columns is not None and originals is not None:
        batch = tuple(call.w.shape[a] for a in dot.batch[1 - call.side])
        n = dot.rows(1 - call.side)
        wanted = (*batch, columns.shape[-1], n)
        if columns.shape[:-1] != batch or originals.shape != wanted:
            raise ValueError(
                f"Columns of shape {columns.shape} with weights of shape {originals.shape} do not "
                f"fit a weight of shape {call.w.shape}: wanted {wanted[:-1]} and {wanted}."
            )
    name, _ = first_willing("dot_with_outliers", BACKENDS, lambda b: b.refuses(call), backend)
    return BACKENDS[name].run(call)
