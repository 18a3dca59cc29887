"""Recipes as TOML, both ways: the only place where text becomes schemes.

Reading is strict: an unknown key, an unknown name or a value of another type is an error that says
where it stands and what would have been valid. Nothing is converted: `"64"` is not 64.
"""

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, Union

import msgspec

from ..intercept import Recipe, Rule
from ..numerics import Format, FORMATS
from ..qarray import Scheme, schemes, Tile
from ..training import LoRA
from ._algorithms import (
    ALGORITHMS,
    fields_from_text,
    fields_to_data,
    outliers_from_text,
    SCALINGS,
    value_from_text,
    value_to_data,
)
from ._names import known, made, nearest
from ._ranges import range_from_text, range_to_data, RangeText
from ._training_text import training_from_data, training_to_data

Size = int | Literal["all"]
"""How many neighbours share a scale; `"all"` is the whole axis (`None` in a `Tile`)."""


class _SchemeText(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    values: str
    contracted: Size
    kept: Size = 1
    ragged: bool = False
    scale: Union["_SchemeText", str] = "float32"
    range: RangeText | str = RangeText(absmax="highest")
    zero_point: str | None = None
    centered: bool = False
    codes_first: bool = False


class _RuleText(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    match: str
    weights: _SchemeText | str | None = None
    activations: _SchemeText | str | None = None
    products: _SchemeText | str | None = None
    algorithm: dict[str, Any] | str | None = None
    scaling: dict[str, Any] | str | None = None
    static: bool = False
    outliers: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    leave: bool = False
    optional: bool = False
    elsewhere: str = "error"


class _RecipeText(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    name: str
    rules: list[_RuleText]
    source: str = ""


# Where a table of one kind stands in a table of another.
_WITHIN: dict[str, type[msgspec.Struct]] = {
    "rules": _RuleText,
    "weights": _SchemeText,
    "activations": _SchemeText,
    "products": _SchemeText,
    "scale": _SchemeText,
    "range": RangeText,
    "mse": RangeText,
}


def load(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a TOML file.

    **Raises:** `ValueError` saying where in the file what is wrong; `OSError` if it cannot be read.

    ```python
    recipe = jq.recipes.load("configs/w4a16_g64.toml")
    ```
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); a recipe is a TOML file."
        ) from None
    return parse(text, where=str(path))


def parse(text: str, *, where: str = "the recipe") -> Recipe:
    """The recipe that a TOML text describes; `where` is what errors call the text.

    **Raises:** `ValueError` saying where in the text what is wrong.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where} is not TOML: {error}.") from None
    read = _typed(data, _RecipeText, where)
    rules = []
    for index, (rule, raw) in enumerate(zip(read.rules, data["rules"], strict=True)):
        rules.append(_rule(rule, f"{where}, {_rule_place(index, raw)}"))
    return made(Recipe, where, name=read.name, rules=tuple(rules), source=read.source)


def dump(recipe: Recipe) -> str:
    """The recipe as TOML, from which `parse` makes an equal one."""
    lines = [f"name = {_quoted(recipe.name)}"]
    if recipe.source:
        lines.append(f"source = {_quoted(recipe.source)}")
    for rule in recipe.rules:
        lines += ["", "[[rules]]", f"match = {_quoted(rule.match)}"]
        if rule.weights is None and rule.products is None:
            lines.append("leave = true")
        for role in ("weights", "activations", "products"):
            scheme = getattr(rule, role)
            if scheme is not None:
                lines.append(f"{role} = {_inline(_named_or_whole(scheme))}")
        for key, data in added_to_data(rule).items():
            lines.append(f"{key} = {_inline(data)}")
        if rule.optional:
            lines.append("optional = true")
        if rule.elsewhere != "error":
            lines.append(f"elsewhere = {_quoted(rule.elsewhere)}")
    return "\n".join(lines) + "\n"


def added_to_data(row: Any) -> dict[str, Any]:
    """What a rule, or a site of a plan, has beside its schemes, as plain data.

    **Raises:** `ValueError` for an algorithm or scaling that has no name as text.
    """
    data: dict[str, Any] = {}
    if row.algorithm is not None:
        data["algorithm"] = value_to_data(row.algorithm, ALGORITHMS)
    if row.scaling is not None:
        data["scaling"] = value_to_data(row.scaling, SCALINGS)
    if row.static:
        data["static"] = True
    if row.outliers is not None:
        data["outliers"] = fields_to_data(row.outliers)
    if row.training is not None:
        data["training"] = training_to_data(row.training, _named_or_whole)
    if row.adapter is not None:
        data["adapter"] = fields_to_data(row.adapter)
    return data


def _scheme_or_name(text: Any, where: str) -> Scheme:
    return _scheme(text if isinstance(text, str) else _typed(text, _SchemeText, where), where)


def added_from_data(data: dict[str, Any], where: str) -> dict[str, Any]:
    """What `added_to_data` wrote, as fields; `data` may hold other keys, and `None`.

    **Raises:** `ValueError` saying where what is wrong.
    """
    fields: dict[str, Any] = {"static": data.get("static", False)}
    for key, kinds in (("algorithm", ALGORITHMS), ("scaling", SCALINGS)):
        if data.get(key) is not None:
            fields[key] = value_from_text(data[key], kinds, f"{where}, {key}")
    if data.get("outliers") is not None:
        fields["outliers"] = outliers_from_text(data["outliers"], f"{where}, outliers")
    if data.get("training") is not None:
        place = f"{where}, training"
        fields["training"] = training_from_data(data["training"], place, _scheme_or_name)
    if data.get("adapter") is not None:
        fields["adapter"] = fields_from_text(data["adapter"], LoRA, f"{where}, adapter")
    return fields


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """The scheme as plain data, with the names that recipes and checkpoint manifests use."""
    scale = scheme.scale
    result = {
        "values": scheme.values.name.lower(),
        "contracted": _size_text(scheme.tile.contracted),
        "kept": _size_text(scheme.tile.kept),
        "scale": scheme_to_dict(scale) if isinstance(scale, Scheme) else scale.name.lower(),
        "range": range_to_data(scheme.range),
    }
    if scheme.zero_point is not None:
        result["zero_point"] = scheme.zero_point.name.lower()
    flags = {"ragged": scheme.tile.ragged}
    flags |= {"centered": scheme.centered, "codes_first": scheme.codes_first}
    return result | {key: True for key, is_set in flags.items() if is_set}


def _named_or_whole(scheme: Scheme) -> Any:
    """The name of a scheme that has one, else its table without what is usual."""
    for name, value in schemes.NAMED.items():
        if scheme == value:
            return name
    return _without_defaults(scheme_to_dict(scheme))


def scheme_from_dict(data: Any, *, where: str) -> Scheme:
    """The scheme that `scheme_to_dict` wrote; `where` is what errors call the place.

    **Raises:** `ValueError` saying where what is wrong.
    """
    return _scheme(_typed(data, _SchemeText, where), where)


def _typed(data: Any, kind: type[Any], where: str) -> Any:
    _check_keys(data, kind, where)
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        place = _place(path.rstrip("`"), data)
        if problem.startswith("Invalid enum value"):
            problem = f"{problem[19:]} is neither a number of elements nor 'all'"
        raise ValueError(f"{where}{place}: {problem}.") from None


def _check_keys(data: Any, kind: type[msgspec.Struct], where: str) -> None:
    """Unknown keys, found here rather than by msgspec so as to name the nearest valid one."""
    if not isinstance(data, dict):
        return
    known = kind.__struct_fields__
    for key, value in data.items():
        if key not in known:
            raise ValueError(
                f"{where}: there is no key {key!r}; the nearest valid one is "
                f"{nearest(key, known)!r} (all: {', '.join(known)})."
            )
        if key not in _WITHIN:
            continue
        if isinstance(value, list):
            for index, each in enumerate(value):
                _check_keys(each, _WITHIN[key], f"{where}, {_rule_place(index, each)}")
        else:
            _check_keys(value, _WITHIN[key], f"{where}, {key}")


def _rule_place(index: int, raw: Any) -> str:
    match = raw.get("match") if isinstance(raw, dict) else None
    return f"rule {index + 1}" + (f" ({match!r})" if isinstance(match, str) else "")


def _place(path: str, data: Any) -> str:
    """`.rules[0].weights.kept` of msgspec, as a reader of the file would say it."""
    found = re.match(r"\.rules\[(\d+)\](.*)", path)
    if found:
        index = int(found[1])
        rest = found[2].lstrip(".")
        return f", {_rule_place(index, data['rules'][index])}" + (f", {rest}" if rest else "")
    return f", {path.lstrip('.')}" if path else ""


def _rule(rule: _RuleText, where: str) -> Rule:
    if rule.leave == (rule.weights is not None) and rule.products is None:
        got = "both" if rule.leave else "neither"
        raise ValueError(
            f"{where}: a rule has either `weights` or `leave = true`, and this one has {got}. "
            "Say what happens to the sites that it matches."
        )
    if rule.leave and rule.products is not None:
        raise ValueError(
            f"{where}: `products` beside `leave = true`: a product that is left computes as the "
            "model does. Remove one of them."
        )
    if rule.leave and rule.activations is not None:
        raise ValueError(
            f"{where}: `activations` beside `leave = true`: a site that is left computes as the "
            "model does. Remove one of them."
        )
    return made(
        Rule,
        where,
        match=rule.match,
        weights=None if rule.weights is None else _scheme(rule.weights, f"{where}, weights"),
        activations=None
        if rule.activations is None
        else _scheme(rule.activations, f"{where}, activations"),
        products=None if rule.products is None else _scheme(rule.products, f"{where}, products"),
        optional=rule.optional,
        elsewhere=rule.elsewhere,
        **added_from_data(msgspec.structs.asdict(rule), where),
    )


def _scheme(text: _SchemeText | str, where: str) -> Scheme:
    if isinstance(text, str):
        return schemes.NAMED[known(text, schemes.NAMED, where)]
    zero, scale = text.zero_point, f"{where}, scale"
    return made(
        Scheme,
        where,
        values=_format(text.values, f"{where}, values"),
        tile=made(
            Tile,
            where,
            contracted=_size(text.contracted),
            kept=_size(text.kept),
            ragged=text.ragged,
        ),
        scale=_format(text.scale, scale)
        if isinstance(text.scale, str)
        else _scheme(text.scale, scale),
        range=range_from_text(text.range, f"{where}, range"),
        zero_point=None if zero is None else _format(zero, f"{where}, zero_point"),
        centered=text.centered,
        codes_first=text.codes_first,
    )


def _format(name: str, where: str) -> Format:
    names = {each.lower(): row for each, row in FORMATS.items()}
    return names[known(name, names, where)]


def _size(size: Size) -> int | None:
    return None if size == "all" else size


def _size_text(size: int | None) -> Size:
    return "all" if size is None else size


def _without_defaults(scheme: dict[str, Any]) -> dict[str, Any]:
    usual = {"kept": 1, "scale": "float32", "range": {"absmax": "highest"}}
    return {
        key: _without_defaults(value) if key == "scale" and isinstance(value, dict) else value
        for key, value in scheme.items()
        if usual.get(key) != value
    }


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
