"""Windows of token ids, from a file of ids or from text."""

import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._score import checked_windows

_KEY = "tokens"


def read_tokens(path: str | Path) -> np.ndarray:
    """The array `tokens` `[windows, length]` of the `.npz` file at `path`.

    **Raises:** `FileNotFoundError`; `ValueError` if the file is no `.npz` or holds something else.
    """
    wanted = f"A .npz file with an integer array {_KEY!r} [windows, length] was wanted."
    try:
        # Opened here: NumPy leaves a file open that turns out to be none of its own.
        with open(path, "rb") as opened:
            file: Any = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError(f"{path} is a single array. {wanted}")
            if _KEY not in file.files:
                found = ", ".join(map(repr, file.files[:6])) or "no array"
                raise ValueError(f"{path} holds {found}. {wanted}")
            tokens = file[_KEY]
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}). {wanted}") from None
    except ValueError as error:
        if wanted in str(error):
            raise
        # NumPy takes whatever it does not know for a pickle, and refuses.
        raise ValueError(f"{path} is no .npz file of plain arrays. {wanted}") from None
    try:
        return checked_windows(tokens)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def windows_of_text(text: str, encode: Callable[[str], Sequence[int]], length: int) -> np.ndarray:
    """`text` as windows of `length` ids `[windows, length]`, one after the other.

    `encode` is a tokenizer's. What is left after the last whole window is dropped; no token is
    added at a window's start.

    **Raises:** `ValueError` if the text does not fill one window.
    """
    if length < 2:
        raise ValueError(f"A window holds at least 2 tokens, not {length}.")
    ids = encode(text)
    count = len(ids) // length
    if count == 0:
        raise ValueError(
            f"The text has {len(ids)} tokens, which do not fill one window of {length}. Give more "
            "text, or a smaller window."
        )
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)
