"""Windows of tokens that a command line names: a file of ids, or text and how to cut it."""

import pathlib

import numpy as np

from ..evaluate import windows_of_text
from ..models import OpenedModel

LENGTH = 512
"""Tokens of a window, where text is cut and nothing else is said."""


def text_windows(path: pathlib.Path, opened: OpenedModel, length: int, *, ids: str) -> np.ndarray:
    """The text at `path` as windows of the model's own tokens `[windows, length]`.

    `ids` is what to give in place of text, for the error of who gave something else.

    **Raises:** `OSError`; `ValueError` for a file that is not UTF-8 or too short; `CheckpointError`
    for a model without a tokenizer.
    """
    return windows_of_text(read_text(path, ids=ids), opened.tokenizer.encode, length)


def read_text(path: pathlib.Path, *, ids: str) -> str:
    """The text of a UTF-8 file.

    **Raises:** `OSError`; `ValueError` if the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). For token ids use "
            f"{ids}."
        ) from None
