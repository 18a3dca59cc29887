"""What a model is calibrated on: batches of its arguments, checked before anything is computed."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checked_batches(batches: Iterable[Any]) -> list[tuple[Any, ...]]:
    """The batches as a list of tuples of arguments.

    **Raises:** `ValueError` if there are none, or if one holds NaN, infinity, or an array of no
    values; `TypeError` for one that is no tuple.
    """
    result = []
    for number, batch in enumerate(batches):
        if not isinstance(batch, tuple):
            raise TypeError(
                f"Each batch is a tuple of the call's arguments, not {type(batch).__name__}. "
                "For one argument write (tokens,)."
            )
        for leaf in jax.tree.leaves(batch):
            if np.size(leaf) == 0:
                raise ValueError(
                    f"Batch {number} of the calibration data holds an array of shape "
                    f"{np.shape(leaf)}, with no values. Leave it out."
                )
            if not jnp.issubdtype(np.asarray(leaf).dtype, jnp.floating):
                continue
            if not np.isfinite(np.asarray(leaf, np.float64)).all():
                raise ValueError(
                    f"Batch {number} of the calibration data holds NaN or infinity. Repair it, or "
                    "leave it out."
                )
        result.append(batch)
    if not result:
        raise ValueError("There is no calibration data: the batches are empty. Give at least one.")
    return result


def token_batches(tokens: Any, vocabulary: int, *, size: int = 8) -> list[tuple[Any, ...]]:
    """Windows of tokens `[windows, length]` as batches of at most `size` windows.

    All batches have one shape where the number of windows has a divisor that is not much smaller
    than `size`; else the last is shorter, and is compiled apart.

    **Raises:** `ValueError` for an empty array, another rank, ids outside of the vocabulary, or a
    `size` below 1; `TypeError` if tokens are not integers.
    """
    if size < 1:
        raise ValueError(f"A batch has at least 1 window; got size={size}.")
    array = np.asarray(tokens)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"Tokens are integers, not {array.dtype}. Give ids, not embeddings.")
    if array.ndim != 2 or not array.size:
        raise ValueError(
            f"Calibration tokens are windows [windows, length] with something in them, not an "
            f"array of shape {array.shape}. Cut the text into windows."
        )
    lowest, highest = int(array.min()), int(array.max())
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        window, position = (int(i) for i in np.argwhere(array == wrong)[0])
        raise ValueError(
            f"Window {window} of the calibration tokens holds {wrong} at position {position}, but "
            f"the vocabulary has {vocabulary} entries. Use the tokenizer of this model."
        )
    even = [n for n in range(1, min(size, len(array)) + 1) if len(array) % n == 0]
    size = even[-1] if 2 * even[-1] > min(size, len(array)) else min(size, len(array))
    parts = range(0, len(array), size)
    return [(jnp.asarray(array[i : i + size].astype(np.int32)),) for i in parts]
