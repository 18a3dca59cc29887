"""What the codes of each format stand for, and how they are packed, once more: NumPy alone.

Nothing here reads a table, a bit or a rounding of `jaxquant`; only `bits` and `name` of a format.
"""

import functools

import ml_dtypes
import numpy as np

from jaxquant.numerics import Format

# Floats that ml_dtypes has: a code is their bits.
FLOATS = {
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E8M0": ml_dtypes.float8_e8m0fnu,
}
SCALES = {"FLOAT16": np.float16, "BFLOAT16": ml_dtypes.bfloat16, "FLOAT32": np.float32}
# QLoRA (arXiv:2305.14314), appendix E.
NF4 = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
0.24611230194568634 0.33791524171229224 0.44070982933044434 0.5626170039176941
0.7229568362236023 1.0
"""
# By code, in the source of bitsandbytes: 0b0001 is 0.005208333, 0b0010 is 2/3, ...
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]


@functools.cache
def code_values(format: Format) -> np.ndarray:
    """The value of each code, as float64, by the code's bits; NaN where there is none.

    Floats of 16 and 32 bits have too many codes for a table.
    """
    codes = np.arange(2**format.bits)
    match format.name:
        case "TERNARY":
            return np.float64([0, 1, np.nan, -1])
        case "BINARY":
            return np.float64([1, -1])
        case "NF4":
            return np.float32(NF4.split()).astype(np.float64)
        case "FP4":
            return np.float32([*FP4, *(0 - x for x in FP4)]).astype(np.float64)
        case "DYNAMIC8":
            return _dynamic().astype(np.float64)
        case name if name.startswith("UINT"):
            return codes.astype(np.float64)
        case name if name.startswith("INT"):
            return np.where(codes < 2 ** (format.bits - 1), codes, codes - 2.0**format.bits)
        case name:
            return codes.astype(np.uint8).view(FLOATS[name]).astype(np.float64)


def _dynamic() -> np.ndarray:
    """Seven decades of 1, 2, 4, ... 64 equal parts, each held by its middle; 0 and 1."""
    numbers = [np.float32([0, 1])]
    for i in range(7):
        # `torch.linspace(0.1, 1, 2**i + 1)` steps from both ends towards the middle, fused.
        start, step = np.float32(0.1), (np.float32(1) - np.float32(0.1)) / np.float32(2**i)
        ends = [
            np.float32(
                float(start) + j * float(step) if 2 * j < 2**i else 1 - (2**i - j) * float(step)
            )
            for j in range(2**i + 1)
        ]
        middles = (np.float32(ends[1:]) + np.float32(ends[:-1])) * np.float32(0.5)
        numbers += [sign * np.float32(10.0 ** (i - 6)) * middles for sign in (-1, 1)]
    return np.sort(np.concatenate(numbers)).astype(np.float32)


def every_value(format: Format) -> np.ndarray:
    """The finite values of a format of at most 8 bits, in increasing order, 0 once."""
    values = code_values(format)
    return np.unique(values[np.isfinite(values)] + 0.0)


def bits_of(codes: np.ndarray, format: Format) -> np.ndarray:
    """The bits of codes, as whole numbers, from whatever dtype holds them."""
    codes = np.asarray(codes)
    if format.name in FLOATS and codes.dtype == FLOATS[format.name]:
        return codes.view(np.uint8).astype(np.int64)
    return codes.astype(np.int64) & (2**format.bits - 1)


def values_of(codes: np.ndarray, format: Format) -> np.ndarray:
    """What codes stand for, in float64."""
    if format.name in SCALES:
        return np.asarray(codes).astype(np.float64)
    return code_values(format)[bits_of(codes, format)]


def unpacked(packed: np.ndarray, bits: int, block: int) -> np.ndarray:
    """The bits of codes of `bits` bits, from bytes; a part of `w` bits at a time.

    In a block of `n` codes, the part of code `i` lies `i mod (n w / 8)` bytes after that part's
    first, and `w (i div (n w / 8))` bits above the lowest.
    """
    size = block * bits // 8
    blocks = packed.reshape(*packed.shape[:-1], -1, size).astype(np.int64)
    i = np.arange(block)
    codes = np.zeros((*blocks.shape[:-1], block), np.int64)
    start = low = 0
    for width in (w for w in (4, 2, 1) if bits & w):
        run = block * width // 8
        part = blocks[..., start + i % run] >> (width * (i // run)) & (2**width - 1)
        codes |= part << low
        start, low = start + run, low + width
    return codes.reshape(*packed.shape[:-1], -1)
