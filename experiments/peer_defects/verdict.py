"""What a case is, and what a judge says about one side of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Outputs = dict[str, np.ndarray]
"""What a library gave for one part of a case, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """`said` is a line for people, `measured` the same for machines."""

    ok: bool
    said: str
    measured: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One defect: inputs for every part of it, and a judge that knows no library.

    `judge(part, inputs, outputs)` reads what a library gave, whichever it was. `built` is whether
    jaxquant has what the case is about. A part in `may_refuse` that both libraries raise on counts
    for neither.
    """

    number: int
    title: str
    criterion: str
    parts: tuple[str, ...]
    inputs: Callable[[str], dict[str, np.ndarray]]
    judge: Callable[[str, dict[str, np.ndarray], Outputs], Verdict]
    built: bool = True
    may_refuse: tuple[str, ...] = ()
