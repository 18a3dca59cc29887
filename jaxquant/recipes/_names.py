"""Names in texts: found, or answered with the nearest valid one."""

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name that looks most like `name`."""
    return difflib.get_close_matches(name, list(valid), n=1, cutoff=0.0)[0]


def known(name: str, valid: Iterable[str], where: str, *, instead: str = "") -> str:
    """`name`, if it is valid.

    **Raises:** `ValueError` with the place, the nearest valid name and all others.
    """
    valid = list(valid)
    if name not in valid:
        raise ValueError(
            f"{where}: there is no {name!r}; the nearest valid name is {nearest(name, valid)!r}"
            f"{instead} (all: {', '.join(valid)})."
        )
    return name


def made(kind: Any, where: str, **fields: Any) -> Any:
    """`kind(**fields)`, whose own complaints gain the place in the text."""
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
