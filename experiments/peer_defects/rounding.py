"""Rounding in NumPy float64, written here and used by no library: what the judges compare with."""

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""Magnitudes of the 4-bit float of OCP's microscaling formats."""
# 448 is the largest; the code above it is NaN.
E4M3 = np.unique(
    [0.0]
    + [m * 2.0**-9 for m in range(1, 8)]
    + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)]
)
"""Magnitudes of the 8-bit float with 3 bits of mantissa, without infinities."""
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    + [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    + [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    + [0.7229568362236023, 1.0]
)
"""Appendix E of https://arxiv.org/abs/2305.14314."""


def signed(magnitudes: np.ndarray) -> np.ndarray:
    """The values of a format that has a sign, in order."""
    return np.unique(np.concatenate([-magnitudes, magnitudes]))


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The nearest of the ordered `values`, which an `x` beyond them is clipped to."""
    above = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    low, high = values[above - 1], values[above]
    return np.where(x - low <= high - x, low, high)


def peak(w: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The largest magnitude over `axes`, which are kept."""
    return np.abs(np.asarray(w, np.float64)).max(axis=axes, keepdims=True)


def to_integers(w: np.ndarray, bits: int, axes: tuple[int, ...]) -> np.ndarray:
    """`w` rounded to integers; the peak over `axes` becomes `2^(bits-1) - 1`."""
    step = peak(w, axes) / (2 ** (bits - 1) - 1)
    return np.rint(np.asarray(w, np.float64) / step) * step


def to_table(w: np.ndarray, values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """`w` rounded to `values`, whose largest stands for the peak over `axes`."""
    scale = peak(w, axes) / np.abs(values).max()
    return nearest(np.asarray(w, np.float64) / scale, values) * scale


def asymmetric(w: np.ndarray, bits: int, axes: tuple[int, ...]) -> np.ndarray:
    """`w` rounded to `2^bits` even steps between its least and its largest value."""
    w = np.asarray(w, np.float64)
    low, high = w.min(axis=axes, keepdims=True), w.max(axis=axes, keepdims=True)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    step = (high - low) / (2**bits - 1)
    zero = np.rint(-low / step)
    return (np.clip(np.rint(w / step) + zero, 0, 2**bits - 1) - zero) * step


def _tiles(w: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(w, np.float64).reshape(-1, size, w.shape[-1])


def nvfp4(w: np.ndarray) -> np.ndarray:
    """NVFP4 along axis 0: 16 values of E2M1 a scale of E4M3, and one float for all scales."""
    tiles = _tiles(w, 16)
    overall = np.abs(tiles).max() / (E2M1.max() * E4M3.max())
    scale = nearest(peak(tiles, (1,)) / E2M1.max() / overall, E4M3) * overall
    scale = np.where(scale == 0, 1, scale)
    return (nearest(tiles / scale, signed(E2M1)) * scale).reshape(w.shape)


def mxfp4(w: np.ndarray, *, up: bool) -> np.ndarray:
    """MXFP4 along axis 0: 32 values of E2M1 a power of two, by OCP's rule or rounded up."""
    tiles = _tiles(w, 32)
    if up:
        exponent = np.ceil(np.log2(peak(tiles, (1,)) / E2M1.max()))
    else:
        exponent = np.floor(np.log2(peak(tiles, (1,)))) - 2
    return (nearest(tiles / 2**exponent, signed(E2M1)) * 2**exponent).reshape(w.shape)


def binary(w: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The best single bit: the sign times the mean magnitude."""
    w = np.asarray(w, np.float64)
    return np.where(w < 0, -1, 1) * np.abs(w).mean(axis=axes, keepdims=True)


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference, over that of what is wanted; infinite if not finite."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    if got.shape != wanted.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.sqrt(((got - wanted) ** 2).mean() / (wanted**2).mean()))
