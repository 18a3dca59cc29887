"""Algorithms and scalings as text, both ways: frozen values, by their names and fields.

A value is its name, `"hqq"`, or a table with the name as a key and what is not usual about it:
`{ gptq = { damping = 0.05 } }`. Choices (`enum`) are their values, ranges as in a scheme, values
inside a value as a value. A field that may be `None` is `"none"` where that is not usual.
"""

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from ..algorithms import AWQ, ClipSearch, GPTQ, HQQ, RangeSearch, SmoothQuant
from ..numerics import Range
from ..ops import Outliers
from ..training import Delayed, LSQ, LSQPlus, MovingAverage, PACT, StraightThrough
from ._names import known, nearest
from ._ranges import range_from_text, range_to_data, RangeText

ALGORITHMS: dict[str, type[Any]] = {
    "clip_search": ClipSearch,
    "gptq": GPTQ,
    "hqq": HQQ,
    "range_search": RangeSearch,
}
"""What `algorithm` may name."""
SCALINGS: dict[str, type[Any]] = {"awq": AWQ, "smoothquant": SmoothQuant}
"""What `scaling` may name."""
ESTIMATORS: dict[str, type[Any]] = {
    each.name: each for each in (StraightThrough, LSQ, LSQPlus, PACT, MovingAverage, Delayed)
}
"""What `training` may name for an operand."""

_RANGES = typing.get_args(Range)


def value_from_text(text: Any, kinds: Mapping[str, type[Any]], where: str) -> Any:
    """The value that a name, or a table of a name and settings, stands for.

    **Raises:** `ValueError` saying where what is wrong.
    """
    if isinstance(text, str):
        name, settings = text, {}
    elif isinstance(text, dict) and len(text) == 1:
        ((name, settings),) = text.items()
    else:
        raise ValueError(
            f"{where}: a name, or a table with a name as its only key; got {_shown(text)}."
        )
    if not kinds:
        raise ValueError(f"{where}: there is no {name!r}; none is known here.")
    kind = kinds[known(name, kinds, where)]
    return fields_from_text(settings, kind, f"{where}, {name}")


def fields_from_text(settings: Any, kind: type[Any], where: str) -> Any:
    """The value of `kind` with `settings` as fields; those left out are as usual.

    **Raises:** `ValueError` saying where what is wrong.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: settings are a table; got {_shown(settings)}.")
    hints = _hints(kind)
    for key in settings:
        if key not in hints:
            raise ValueError(
                f"{where}: there is no key {key!r}; "
                + (
                    f"the nearest valid one is {nearest(key, hints)!r} (all: {', '.join(hints)})."
                    if hints
                    else "it has no settings."
                )
            )
    made = {key: _field(text, hints[key], f"{where}, {key}") for key, text in settings.items()}
    try:
        return kind(**made)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def value_to_data(value: Any, kinds: Mapping[str, type[Any]]) -> Any:
    """The text of a value, as plain data.

    **Raises:** `ValueError` for a value that has no name here.
    """
    name = next((name for name, kind in kinds.items() if type(value) is kind), None)
    if name is None:
        raise ValueError(
            f"{value} has no name as text; those that do are {', '.join(kinds) or 'none'}. Use one "
            "of these where a recipe or plan is to be stored."
        )
    fields = fields_to_data(value)
    return {name: fields} if fields else name


def fields_to_data(value: Any) -> dict[str, Any]:
    """The fields of a value that are not as usual, as plain data."""
    usual = {f.name: f.default for f in dataclasses.fields(value)}
    usual |= {
        f.name: f.default_factory()
        for f in dataclasses.fields(value)
        if f.default_factory is not dataclasses.MISSING
    }
    given = {name: getattr(value, name) for name in _hints(type(value))}
    return {name: _plain(each) for name, each in given.items() if each != usual[name]}


def outliers_from_text(text: Any, where: str) -> Outliers:
    """`{ threshold = 6.0 }`; an empty table is as usual.

    **Raises:** `ValueError` saying where what is wrong.
    """
    return fields_from_text(text, Outliers, where)


def _hints(kind: type[Any]) -> dict[str, Any]:
    """The types of the fields that can be set; a name tells a value's kind, and is no setting."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init and f.name != "name"}


def _choices(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _field(text: Any, hint: Any, where: str) -> Any:
    """One field, by its type. Nothing is converted but an integer to a float."""
    choices = _choices(hint)
    if text == "none" and type(None) in choices:
        return None
    for kind in choices:
        if typing.get_origin(kind) is tuple and isinstance(text, list):
            each, *_ = typing.get_args(kind)
            return tuple(_field(x, each, f"{where}, {i + 1}") for i, x in enumerate(text))
        if kind is float and type(text) in (int, float):
            return float(text)
        if kind in (bool, int, str) and type(text) is kind:
            return text
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            names = {_enum_text(each): each for each in kind}
            return names[known(str(text), names, where)]
    if any(kind in _RANGES for kind in choices):
        return _range(text, where)
    nested: dict[str, Any] = {_class_text(k): k for k in choices if dataclasses.is_dataclass(k)}
    if nested:
        return value_from_text(text, nested, where)
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in choices)
    raise ValueError(f"{where}: wanted {wanted}; got {_shown(text)}.")


def _range(text: Any, where: str) -> Any:
    if isinstance(text, str):
        return range_from_text(text, where)
    try:
        return range_from_text(msgspec.convert(text, RangeText), where)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {error}.") from None


def _plain(value: Any) -> Any:
    if value is None:
        return "none"
    if isinstance(value, enum.Enum):
        return _enum_text(value)
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, _RANGES):
        return range_to_data(value)
    if dataclasses.is_dataclass(value):
        return value_to_data(value, {_class_text(type(value)): type(value)})
    return value


def _enum_text(value: enum.Enum) -> str:
    return value.value if isinstance(value.value, str) else value.name.lower()


def _class_text(kind: Any) -> str:
    """`ClipSearch` is `clip_search`."""
    name = kind.__name__
    return "".join(
        f"_{c.lower()}" if c.isupper() and i and not name[i - 1].isupper() else c.lower()
        for i, c in enumerate(name)
    )


def _shown(value: Any) -> str:
    return f"{value!r}" if not isinstance(value, dict) else f"a table with {', '.join(value)}"
