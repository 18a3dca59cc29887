"""The model, the tokens to calibrate with and those to score it on."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from jaxquant.cli._demo import excerpt
from jaxquant.evaluate import read_tokens, windows_of_text
from jaxquant.models import find_smollm2, open_model, OpenedModel

LENGTH = 512
CALIBRATION_SHARE = 2 / 3
"""Of the excerpt, its beginning; what is left is scored."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where tokens come from (`None`: the excerpt that the package carries), and how many."""

    calibration: pathlib.Path | None = None
    evaluation: pathlib.Path | None = None
    quick: bool = False


def opened() -> OpenedModel:
    return open_model(find_smollm2())


def tokens(data: Data, model: OpenedModel) -> tuple[np.ndarray, np.ndarray]:
    """Windows `[windows, length]` to calibrate with, and to score."""
    parts: list[Any] = [None, None]
    if data.calibration is None or data.evaluation is None:
        windows = windows_of_text(excerpt(), model.tokenizer.encode, 128 if data.quick else LENGTH)
        first = round(CALIBRATION_SHARE * len(windows))
        parts = [windows[:first], windows[first:]]
    if data.calibration is not None:
        parts[0] = read_tokens(data.calibration)
    if data.evaluation is not None:
        parts[1] = read_tokens(data.evaluation)
    if data.quick:
        parts = [parts[0][:8, :128], parts[1][:4, :128]]
    return parts[0], parts[1]


def spread(windows: np.ndarray, most: int | None) -> np.ndarray:
    """At most `most` windows, evenly from all of them."""
    if most is None or len(windows) <= most:
        return windows
    return windows[np.arange(most) * len(windows) // most]
