"""How sites are trained, as plain data, both ways."""

from collections.abc import Callable, Mapping
from typing import Any

from ..qarray import Scheme
from ..training import Delayed, Training, WayBack
from ._algorithms import ESTIMATORS, value_from_text, value_to_data
from ._names import known, made

SchemeToData = Callable[[Scheme], Any]
SchemeFromData = Callable[[Any, str], Scheme]


def training_to_data(training: Training, scheme: SchemeToData) -> dict[str, Any]:
    """What is not usual of `training`; `scheme` says what stands for one."""
    usual, data = Training(), {}
    for operand in ("weights", "activations"):
        estimator = getattr(training, operand)
        if estimator != getattr(usual, operand):
            data[operand] = value_to_data(estimator, ESTIMATORS)
    if training.gradients is not None:
        data["gradients"] = scheme(training.gradients)
    back = training.way_back
    if back is not None:
        own = data["way_back"] = {"gradients": scheme(back.gradients)}
        if back.from_codes:
            own["from_codes"] = True
        if back.scaling is not None:
            own["scaling"] = value_to_data(back.scaling, ESTIMATORS)
    return data


def training_from_data(data: Mapping[str, Any], where: str, scheme: SchemeFromData) -> Training:
    """The inverse; `scheme(data, where)` is the one that data stand for.

    **Raises:** `ValueError` saying where what is wrong.
    """
    fields: dict[str, Any] = {}
    for key, value in data.items():
        place = f"{where}, {key}"
        match known(key, ("weights", "activations", "gradients", "way_back"), where):
            case "gradients":
                fields[key] = scheme(value, place)
            case "way_back":
                fields[key] = _way_back(value, place, scheme)
            case _:
                fields[key] = value_from_text(value, ESTIMATORS, place)
    return made(Training, where, **fields)


def _way_back(data: Any, where: str, scheme: SchemeFromData) -> WayBack:
    if not isinstance(data, dict) or "gradients" not in data:
        raise ValueError(
            f"{where}: a table that has at least `gradients`, the scheme of what arrives; got "
            f"{data!r}."
        )
    fields: dict[str, Any] = {}
    for key, value in data.items():
        place = f"{where}, {key}"
        match known(key, ("gradients", "from_codes", "scaling"), where):
            case "gradients":
                fields[key] = scheme(value, place)
            case "scaling":
                fields[key] = value_from_text(value, {Delayed.name: Delayed}, place)
            case _:
                if not isinstance(value, bool):
                    raise ValueError(f"{place}: true or false, not {value!r}.")
                fields[key] = value
    return made(WayBack, where, **fields)
