"""Range rules as text, both ways.

A rule is a name, `"minmax"`, or a table with the rule's name as a key and its first parameter as
that key's value: `{ absmax = "middle" }`, `{ percentile = 99.9, convention = "middle" }`,
`{ mse = { absmax = "middle" }, grid = 100 }`.
"""

from typing import Any, Union

import msgspec

from ..numerics import (
    AbsMax,
    AbsMean,
    Convention,
    ExponentRule,
    Fixed,
    MeanSquaredError,
    MinMax,
    Percentile,
    Range,
    RootMeanSquare,
    SharedExponent,
)
from ._names import known


class RangeText(
    msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True
):
    """A range rule as it stands in a recipe: one of seven keys, and what belongs to it."""

    absmax: str | None = None
    percentile: float | None = None
    rms: float | None = None
    absmean: float | None = None
    fixed: tuple[float, float] | None = None
    shared_exponent: str | None = None
    mse: Union["RangeText", str, None] = None
    convention: str | None = None
    grid: int | None = None
    shrink: float | None = None
    power: float | None = None


_RULES = ("absmax", "percentile", "rms", "absmean", "fixed", "shared_exponent", "mse")
_BELONGS = {
    "percentile": ("convention",),
    "rms": ("convention",),
    "fixed": ("convention",),
    "mse": ("grid", "shrink", "power"),
}
_NAMES: dict[str, Range] = {"minmax": MinMax(), "minmax_apart": MinMax(include_zero=False)}
"""Rules without parameters; the second may lie apart from 0."""


def range_from_text(text: RangeText | str, where: str) -> Range:
    """The rule that a text names.

    **Raises:** `ValueError` saying where what is wrong.
    """
    if isinstance(text, str):
        known(text, _NAMES, where, instead=' or { absmax = "highest" }')
        return _NAMES[text]
    given = {
        key: value for key in text.__struct_fields__ if (value := getattr(text, key)) is not None
    }
    rules = [key for key in _RULES if key in given]
    if len(rules) != 1:
        raise ValueError(
            f"{where}: a range has one of the keys {', '.join(_RULES)}; got "
            f"{', '.join(rules) or 'none of them'}."
        )
    rule = rules[0]
    extra = [key for key in given if key != rule and key not in _BELONGS.get(rule, ())]
    if extra:
        raise ValueError(f"{where}: {extra[0]!r} does not belong to the range {rule!r}.")
    rest = {key: value for key, value in given.items() if key != rule}
    if "convention" in rest:
        rest["convention"] = _convention(rest["convention"], f"{where}, convention")
    match rule:
        case "absmax":
            return AbsMax(convention=_convention(given["absmax"], f"{where}, absmax"))
        case "percentile":
            return Percentile(percent=given["percentile"], **rest)
        case "rms":
            return RootMeanSquare(multiple=given["rms"], **rest)
        case "absmean":
            return AbsMean(multiple=given["absmean"])
        case "fixed":
            low, high = given["fixed"]
            return Fixed(low=low, high=high, **rest)
        case "shared_exponent":
            names = {each.value: each for each in ExponentRule}
            name = known(given["shared_exponent"], names, f"{where}, shared_exponent")
            return SharedExponent(rule=names[name])
    base = range_from_text(given["mse"], f"{where}, mse")
    if not isinstance(base, (AbsMax, MinMax)):
        raise ValueError(f"{where}, mse: the range that is shrunk is absmax or minmax, not {base}.")
    return MeanSquaredError(base=base, **rest)


def range_to_data(rule: Range) -> Any:
    """The text of a rule, as plain data; parameters that are what they are by default left out."""
    for name, value in _NAMES.items():
        if rule == value:
            return name
    match rule:
        case AbsMax(convention=convention):
            return {"absmax": convention.value}
        case Percentile(percent=percent, convention=convention):
            return {"percentile": percent, **_convention_text(convention)}
        case RootMeanSquare(multiple=multiple, convention=convention):
            return {"rms": multiple, **_convention_text(convention)}
        case AbsMean(multiple=multiple):
            return {"absmean": multiple}
        case Fixed(low=low, high=high, convention=convention):
            return {"fixed": [low, high], **_convention_text(convention)}
        case SharedExponent(rule=exponent):
            return {"shared_exponent": exponent.value}
        case MeanSquaredError(base=base):
            usual = MeanSquaredError(base=base)
            own = {key: getattr(rule, key) for key in _BELONGS["mse"]}
            changed = {key: value for key, value in own.items() if value != getattr(usual, key)}
            return {"mse": range_to_data(base), **changed}
    raise AssertionError(rule)


def _convention(name: str, where: str) -> Convention:
    names = {each.value: each for each in Convention}
    return names[known(name, names, where)]


def _convention_text(convention: Convention) -> dict[str, str]:
    return {} if convention is Convention.HIGHEST else {"convention": convention.value}
