"""Claim 1: each product of a model, on the inputs it gets, against exact arithmetic.

Bounds are in the unit roundoff of float32, `u = 2^-24`, and `gamma(n) = n u / (1 - n u)` bounds the
relative error that `n` roundings one after the other can make (Higham, Accuracy and Stability of
Numerical Algorithms, lemma 3.1). A sum of `k` terms in any order rounds each at most `k - 1` times.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from smollm2 import by_path, Quantized

import jaxquant as jq

U = 2.0**-24
ROWS = (((1,), (0,)), ((), ()))
"""Dimension numbers of `x @ w`."""
ULPS = 2.0
SHARE = 1.0
# Rows whose integer sums NumPy also takes in int64, which is slow; all are summed in float64, where
# integers below 2^53 lose nothing.
INT64_ROWS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """One way in which the package computes a site: a layout, a backend, a number of rows.

    With `rows=1`, a few rows are computed, each by itself; `None` stands for all at once.
    """

    layout: str
    backend: str
    rows: int | None

    def __str__(self) -> str:
        rows = {None: "all rows", 1: "one row"}.get(self.rows, f"{self.rows} rows")
        return f"{self.backend}, {self.layout}, {rows}"


FORMS: dict[str, tuple[Form, ...]] = {
    "w8a8": (
        Form(layout="canonical", backend="xla", rows=None),
        Form(layout="prepared", backend="xla", rows=None),
        Form(layout="prepared", backend="xla_cpu", rows=1),
    ),
    "fp8": (
        Form(layout="canonical", backend="xla", rows=None),
        Form(layout="prepared", backend="xla_cpu", rows=None),
        Form(layout="prepared", backend="xla_cpu", rows=1),
    ),
    "w8a16": (
        Form(layout="canonical", backend="xla", rows=None),
        Form(layout="prepared", backend="xla_cpu", rows=64),
        Form(layout="prepared", backend="xla_cpu", rows=1),
    ),
    # Four digits for each group of 64 leave room for 5 rows of 24 groups below the backend's 512.
    "w4a16_g64": (
        Form(layout="canonical", backend="xla", rows=None),
        Form(layout="prepared", backend="xla_cpu", rows=5),
        Form(layout="prepared", backend="xla_cpu", rows=1),
        Form(layout="packed", backend="xla_cpu", rows=1),
    ),
}


def gamma(roundings: float) -> float:
    return roundings * U / (1 - roundings * U)


def site_errors(
    recipe: str,
    quantized: Quantized,
    inputs: Mapping[str, jax.Array],
    forms: Sequence[Form] | None = None,
) -> Iterator[dict[str, Any]]:
    """For each form of a recipe (default: all in `FORMS`), the worst site."""
    layouts = {"canonical": by_path(quantized.canonical), "prepared": by_path(quantized.prepared)}
    if recipe == "w4a16_g64":
        packed = jq.prepare(quantized.canonical, quantized.plan, backend="xla_cpu", packed=True)
        layouts["packed"] = by_path(packed)
    schemes = {site.path: site.activations for site in quantized.plan.sites}
    for form in FORMS[recipe] if forms is None else forms:
        measured = [
            {
                "site": path,
                **_measured(form, layouts[form.layout][path], schemes[path], rows),
            }
            for path, x in inputs.items()
            for rows in _taken(x, form.rows)
        ]
        yield _summary(recipe, form, measured, len(inputs))


def _taken(x: jax.Array, rows: int | None) -> list[jax.Array]:
    if rows is None:
        return [x]
    if rows == 1:
        last = x.shape[0] - 1
        return [x[i : i + 1] for i in sorted({0, last // 2, last})]
    return [x[-rows:]]


def _summary(recipe: str, form: Form, measured: list[dict[str, Any]], sites: int) -> dict[str, Any]:
    unit = "ulp" if recipe == "w8a8" else "share of bound"
    worst = max(measured, key=lambda m: m["error"])
    limit = ULPS if recipe == "w8a8" else SHARE
    wrong = sum(m.get("unequal_sums", 0) for m in measured)
    flips = sum(m.get("flips", 0) for m in measured)
    result = {
        "recipe": recipe,
        "form": str(form),
        "sites": sites,
        "rows": sum(m["rows"] for m in measured),
        "unit": unit,
        "worst": worst["error"],
        "worst_site": worst["site"],
        "limit": limit,
        "holds": bool(worst["error"] <= limit and wrong == 0),
    }
    if recipe in ("w8a8", "fp8"):
        # Would tell of codes that depend on how the rounding is compiled.
        result["outputs_that_differ_when_compiled_together"] = flips
    if recipe == "w8a8":
        result["integer_sums_that_differ"] = wrong
        result["largest_integer_sum"] = max(m["largest_sum"] for m in measured)
    return result


def _measured(form: Form, w: jq.QArray, scheme: jq.Scheme | None, x: jax.Array) -> dict[str, Any]:
    if scheme is None:
        y = np.asarray(_product(form.backend)(x, w), np.float64)
        error = np.abs(y - _values(x) @ _values(w)) / _weight_only_bound(form, x, w)
        return {"rows": x.shape[0], "error": float(error.max())}
    a = _rounded(scheme)(x)
    y = np.asarray(_product(form.backend)(a, w))
    together = np.asarray(_rounded_product(form.backend, scheme)(x, w))
    found: dict[str, Any] = {"rows": x.shape[0], "flips": int((together != y).sum())}
    codes, scales = (_codes(a), _codes(w)), np.multiply(_scales(a), _scales(w))
    sums = codes[0] @ codes[1]
    if scheme.values.integer:
        found |= _integer_sums(form, a, w, sums)
        found["error"] = float(_in_ulps(y, sums * scales).max())
        return found
    magnitude = np.abs(codes[0]) @ np.abs(codes[1])
    # Products of two e4m3 numbers are exact in float32. k - 1 roundings of sums, 2 of scales.
    bound = gamma(codes[0].shape[1] + 1) * magnitude * scales
    found["error"] = float(_shares(np.abs(y - sums * scales), bound).max())
    return found


def _integer_sums(form: Form, a: jq.QArray, w: jq.QArray, sums: np.ndarray) -> dict[str, Any]:
    """The int32 sums, seen through scales of 1: the product is then the float32 next to each.

    As long as no sum reaches 2^24 that float32 is the sum itself.
    """
    exact = _codes(a)[:INT64_ROWS].astype(np.int64) @ _codes(w).astype(np.int64)
    assert np.array_equal(exact, sums[:INT64_ROWS].astype(np.int64))
    unscaled = (dataclasses.replace(q, scale=jnp.ones_like(q.scale)) for q in (a, w))
    got = np.asarray(_product(form.backend)(*unscaled))
    return {
        "unequal_sums": int((got != sums.astype(np.float32)).sum()),
        "largest_sum": int(np.abs(sums).max()),
    }


def _weight_only_bound(form: Form, x: jax.Array, w: jq.QArray) -> np.ndarray:
    """How far a weight-only product may be from the exact one.

    *xla*: three roundings for codes, scales and their product with `x`, `k - 1` for sums.

    *Digits* (`xla_cpu`), first order in `u`. With `A = sum |x w|`, `W = sum |w|` and the step
    `s = peak / 127`:
    - a row in fixed point: `x / s` is rounded twice (it may be a product with a reciprocal), then
      to a multiple of 2^-24: `2 u A + u s W / 2`;
    - four int32 sums become float32, and are added up. Digits but the first lie between -128 and
      127, so the first sum is at most `A + 0.51 s W`, the second `0.5 s W`, and every partial sum
      of theirs `A + 0.01 s W`: `4 u A + 1.04 u s W`;
    - two scales, and the sum over `g` groups: `(g + 1) u A`.
    It does not grow with `k`. What is left of `2 s W` is far above all terms of second order.
    """
    a, b = np.abs(_values(x)), np.abs(_values(w))
    magnitude = a @ b
    if form.backend == "xla":
        return gamma(x.shape[1] + 3) * magnitude
    groups = w.shape[0] // w.tile[0]
    step = a.max(axis=1, keepdims=True) / 127
    return U * ((7 + groups) * magnitude + 2 * step * b.sum(axis=0))


@functools.cache
def _product(backend: str) -> Any:
    return jax.jit(lambda a, w: jq.dot_general(a, w, ROWS, backend=backend))


@functools.cache
def _rounded(scheme: jq.Scheme) -> Any:
    return jax.jit(lambda x: jq.quantize_activation(x, scheme, contracted=(1,)))


@functools.cache
def _rounded_product(backend: str, scheme: jq.Scheme) -> Any:
    """Rounding and product as one program, as inside a compiled model."""

    def together(x: Any, w: Any) -> Any:
        a = jq.quantize_activation(x, scheme, contracted=(1,))
        return jq.dot_general(a, w, ROWS, backend=backend)

    return jax.jit(together)


def _values(x: Any) -> np.ndarray:
    """What an array or QArray stands for, in float64."""
    if not isinstance(x, jq.QArray):
        return np.asarray(x).astype(np.float64)
    scales = _scales(x)
    for axis, tile in enumerate(x.tile):
        scales = np.repeat(scales, tile, axis=axis)
    return _codes(x) * scales


def _canonical(q: jq.QArray) -> jq.QArray:
    return jq.relayout(q, jq.Layout())


def _codes(q: jq.QArray) -> np.ndarray:
    return np.asarray(_canonical(q).codes).astype(np.float64)


def _scales(q: jq.QArray) -> np.ndarray:
    return np.asarray(_canonical(q).scale).astype(np.float64)


def _in_ulps(y: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Distance in units in the last place of the float32 next to `exact`."""
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return np.abs(y.astype(np.float64) - exact) / spacing


def _shares(error: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """`error / bound`; where both are 0, as for a row of zeros, 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(error == 0, 0.0, error / bound)
