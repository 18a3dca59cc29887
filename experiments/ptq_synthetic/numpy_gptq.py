"""What GPTQ is told from, in NumPy's float64: columns corrected by the raw inverse."""

import numpy as np


def grid(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Gap and zero point of each row, for a range that reaches 0."""
    low, high = np.minimum(w.min(axis=1), 0), np.maximum(w.max(axis=1), 0)
    gap = (high - low) / (2**bits - 1)
    gap[gap == 0] = 1
    return gap, np.round(-low / gap)


def raw_inverse(w: np.ndarray, gram: np.ndarray, bits: int, group: int | None) -> np.ndarray:
    """Errors go to later columns by the rows of the inverse, from which no column was eliminated.

    A `group` of `None` has each column of the weight share a scale, over all rows.
    """
    k = len(gram)
    dead = gram.diagonal() == 0
    gram = gram + np.diag(np.where(dead, 1.0, 0.0))
    inverse = np.linalg.inv(gram + 0.01 * gram.diagonal().mean() * np.eye(k))
    left, q = np.where(dead, 0.0, w), np.zeros_like(w)
    for i in range(k):
        if group is None:
            gap, zero = grid(left[:, i][None], bits)
        elif i % group == 0:
            gap, zero = grid(left[:, i : i + group], bits)
        codes = np.clip(np.round(left[:, i] / gap) + zero, 0, 2**bits - 1)
        q[:, i] = (codes - zero) * gap
        error = (left[:, i] - q[:, i]) / inverse[i, i]
        left[:, i + 1 :] -= np.outer(error, inverse[i, i + 1 :])
    return q
