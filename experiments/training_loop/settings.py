"""Settings as TOML, read strictly into frozen values: what is not known is an error."""

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from jaxquant.recipes._names import nearest

T = TypeVar("T")


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A table of a settings file; its fields are the keys."""


class Group(Settings):
    """What is different for leaves of one label: the factor of their learning rate, their decay."""

    rate: float = 1.0
    weight_decay: float = 0.0


class Optimizer(Settings):
    """AdamW (Loshchilov & Hutter 2019), its schedule, and clipping of the whole gradient's norm.

    `cosine`: up to `learning_rate` in `warmup` steps, down to `final` of it at the last.
    `two_stage`, of BitNet: see `schedules.two_stage`. Matrices decay, vectors do not. `groups` are
    by label (`Problem.labels`), say of learned scales.
    """

    learning_rate: float
    schedule: Literal["cosine", "two_stage", "constant"] = "cosine"
    warmup: int = 0
    final: float = 0.1
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    clip: float | None = 1.0
    groups: dict[str, Group] = {}


class Loop(Settings):
    """How long, in what portions, and what is written when.

    A step takes `batch` examples, `accumulation` parts of it one after the other. `seed` orders the
    data and is the source of all randomness. `skips` is how many steps whose loss or gradient is
    not finite are left out before the run stops.
    """

    steps: int
    batch: int
    accumulation: int = 1
    seed: int = 0
    skips: int = 0
    log_every: int = 10
    evaluate_every: int = 500
    save_every: int = 250
    keep: int = 2


class Devices(Settings):
    """Over how many devices a batch is split, and over how many of these weights are, too (FSDP).

    In all there are `data * fsdp`.
    """

    data: int = 1
    fsdp: int = 1


REPORTING = ("log_every", "evaluate_every", "save_every", "keep")
"""Fields of `Loop` that do not change what is trained."""


def read_settings(path: str | Path, kind: type[T]) -> T:
    """The settings in a TOML file.

    **Raises:** `ValueError` saying where in the file what is wrong; `OSError` if it cannot be read.
    """
    try:
        data = tomllib.loads(Path(path).read_bytes().decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}.") from None
    return typed(data, kind, str(path))


def typed(data: Any, kind: type[T], where: str) -> T:
    """Plain data as settings. Nothing is converted but an integer to a float.

    **Raises:** `ValueError` naming the key, and for one that is not known the nearest that is.
    """
    _check_keys(data, msgspec.inspect.type_info(kind), where)
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
        place = place.rstrip("`").lstrip(".")
        raise ValueError(f"{where}{f', {place}' if place else ''}: {problem}.") from None


def _check_keys(data: Any, kind: Any, where: str) -> None:
    if isinstance(kind, msgspec.inspect.UnionType):
        structs = [each for each in kind.types if isinstance(each, msgspec.inspect.StructType)]
        if len(structs) == 1:
            _check_keys(data, structs[0], where)
    if isinstance(kind, msgspec.inspect.DictType) and isinstance(data, dict):
        for key, value in data.items():
            _check_keys(value, kind.value_type, f"{where}, {key}")
    if not isinstance(kind, msgspec.inspect.StructType) or not isinstance(data, dict):
        return
    fields = {field.name: field.type for field in kind.fields}
    for key, value in data.items():
        if key not in fields:
            raise ValueError(
                f"{where}: there is no key {key!r}; the nearest valid one is "
                f"{nearest(key, fields)!r} (all: {', '.join(fields)})."
            )
        _check_keys(value, fields[key], f"{where}, {key}")


def as_data(settings: Any) -> Any:
    """Settings as plain data, to be written as JSON."""
    return msgspec.to_builtins(settings)


def check(loop: Loop, optimizer: Optimizer, devices: Devices) -> None:
    """Checks that the numbers fit each other.

    **Raises:** `ValueError` saying which do not.
    """
    counts = {
        "loop.steps": loop.steps,
        "loop.batch": loop.batch,
        "loop.accumulation": loop.accumulation,
        "loop.log_every": loop.log_every,
        "loop.evaluate_every": loop.evaluate_every,
        "loop.save_every": loop.save_every,
        "loop.keep": loop.keep,
        "devices.data": devices.data,
        "devices.fsdp": devices.fsdp,
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; at least 1 is wanted. Correct the settings.")
    count = devices.data * devices.fsdp
    parts = loop.accumulation * count
    if loop.batch % parts:
        raise ValueError(
            f"loop.batch is {loop.batch}, which {loop.accumulation} parts on {count} devices do "
            f"not share evenly. Give a multiple of {parts}."
        )
    if not 0 <= optimizer.warmup < loop.steps:
        raise ValueError(
            f"optimizer.warmup is {optimizer.warmup} of {loop.steps} steps. Give fewer."
        )
    for name in ("learning_rate", "epsilon"):
        if not getattr(optimizer, name) > 0:
            raise ValueError(
                f"optimizer.{name} is {getattr(optimizer, name)}; a positive number is wanted. "
                "Correct the settings."
            )
