"""The same formats in NumPy's float64, from their papers and standards, without jaxquant.

`RULES` maps a row's name to a function from an array of shape (out, in) to its rounded values.
"""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

Rule = Callable[[np.ndarray], np.ndarray]

NF4 = np.array(  # QLoRA (arXiv:2305.14314), appendix E
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171229224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
FP4 = np.unique([s * v / 12 for s in (-1, 1) for v in (0, 0.0625, 2, 3, 4, 6, 8, 12)])
DYNAMIC = np.unique(  # arXiv:1511.04561: decade i in 2^i parts, each held by its middle
    [0.0, 1.0]
    + [
        sign * 10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / 2**i)
        for sign in (-1, 1)
        for i in range(7)
        for j in range(2**i)
    ]
)
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
E3M2, E2M3, E2M1 = ml_dtypes.float6_e3m2fn, ml_dtypes.float6_e2m3fn, ml_dtypes.float4_e2m1fn


def runs(rule: Rule, size: int | None) -> Rule:
    """`rule` on tiles of `size` along the last axis, or on whole rows; it reduces the last axis."""
    return lambda w: rule(w.reshape(len(w), -1, size or w.shape[1])).reshape(w.shape)


def boxes(rule: Rule, size: int) -> Rule:
    """`rule` on square tiles."""

    def rounded(w: np.ndarray) -> np.ndarray:
        tiles = w.reshape(len(w) // size, size, -1, size).swapaxes(1, 2)
        flat = rule(tiles.reshape(*tiles.shape[:2], size * size))
        return flat.reshape(tiles.shape).swapaxes(1, 2).reshape(w.shape)

    return rounded


def whole(rule: Rule) -> Rule:
    return lambda w: rule(w.reshape(1, -1)).reshape(w.shape)


def peak(x: np.ndarray) -> np.ndarray:
    return np.abs(x).max(-1, keepdims=True)


def symmetric(bits: int, divisor: float, factor: float = 1.0) -> Rule:
    def rule(x: np.ndarray) -> np.ndarray:
        scale = peak(x) * factor / divisor
        return np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale

    return rule


def signed(bits: int) -> Rule:
    def rule(x: np.ndarray) -> np.ndarray:
        largest = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)
        scale = largest / -(2 ** (bits - 1))
        return np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale

    return rule


def asymmetric(bits: int, factor: float = 1.0) -> Rule:
    def rule(x: np.ndarray) -> np.ndarray:
        low = np.minimum(x.min(-1, keepdims=True), 0) * factor
        high = np.maximum(x.max(-1, keepdims=True), 0) * factor
        scale = (high - low) / (2**bits - 1)
        zero = np.round(-low / scale)
        return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale

    return rule


def searched(shrunk: Callable[[float], Rule]) -> Rule:
    """GPTQ's `mse=True`: of 80 ranges, the one with the least sum of |error|^2.4, tile by tile."""

    def rule(x: np.ndarray) -> np.ndarray:
        best = shrunk(1.0)(x)
        least = (np.abs(best - x) ** 2.4).sum(-1, keepdims=True)
        for i in range(1, 80):
            now = shrunk(1 - i / 100)(x)
            loss = (np.abs(now - x) ** 2.4).sum(-1, keepdims=True)
            best, least = np.where(loss < least, now, best), np.minimum(loss, least)
        return best

    return rule


def half_quadratic(bits: int, *, refit: bool = False, rounded: bool = True) -> Rule:
    """HQQ: zero points, and perhaps scales, in turn with the sparse part of the error.

    Both are held in float16, and each tile keeps the best of its steps. The first zero point may be
    `rounded` to a code.
    """
    top = 2**bits - 1

    def rule(x: np.ndarray) -> np.ndarray:
        low = np.minimum(x.min(-1, keepdims=True), 0)
        scale = (np.maximum(x.max(-1, keepdims=True), 0) - low) / top
        zero, beta = -low / scale, 10.0
        zero = np.round(zero) if rounded else zero
        best, least = x, np.full_like(scale, np.inf)
        for _ in range(21):
            scale, zero = (each.astype(np.float16).astype(np.float64) for each in (scale, zero))
            codes = np.clip(np.round(x / scale + zero), 0, top)
            now = (codes - zero) * scale
            error = np.abs(x - now).mean(-1, keepdims=True)
            best, least = np.where(error < least, now, best), np.minimum(error, least)
            size = np.maximum(np.abs(x - now), 1e-30)
            target = x - np.sign(x - now) * np.maximum(size - size**-0.3 / beta, 0)
            if refit:
                off = codes - codes.mean(-1, keepdims=True)
                scale = (off * target).sum(-1, keepdims=True) / (off**2).sum(-1, keepdims=True)
            zero = (codes - target / scale).mean(-1, keepdims=True)
            beta *= 1.01
        return best

    return rule


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    return values[np.searchsorted((values[:-1] + values[1:]) / 2, x)]


def table(values: np.ndarray) -> Rule:
    return lambda x: nearest(x / peak(x), values) * peak(x)


def nf4_double(w: np.ndarray) -> np.ndarray:
    """bitsandbytes: scales of the flattened array, less their mean, in 8 bits by 256."""
    x = w.reshape(-1, 64)
    scale = peak(x)
    runs_of_scales = (scale - scale.mean()).reshape(-1, 256)
    held = nearest(runs_of_scales / peak(runs_of_scales), DYNAMIC) * peak(runs_of_scales)
    return (nearest(x / scale, NF4) * (held.reshape(-1, 1) + scale.mean())).reshape(w.shape)


def cast(x: np.ndarray, dtype: type) -> np.ndarray:
    end = float(ml_dtypes.finfo(dtype).max)
    return np.clip(x, -end, end).astype(dtype).astype(np.float64)


def scaled(dtype: type) -> Rule:
    end = float(ml_dtypes.finfo(dtype).max)
    return lambda x: cast(x / (peak(x) / end), dtype) * (peak(x) / end)


def shared_exponent(dtype: type, *, floor: bool) -> Rule:
    """OCP MX v1.0, section 6.3, or the least exponent that clips nothing."""
    end = float(ml_dtypes.finfo(dtype).max)

    def rule(x: np.ndarray) -> np.ndarray:
        if floor:
            exponent = np.floor(np.log2(peak(x))) - math.floor(math.log2(end))
        else:
            exponent = np.ceil(np.log2(peak(x) / end))
        return cast(x / 2**exponent, dtype) * 2**exponent

    return rule


def nvfp4(w: np.ndarray) -> np.ndarray:
    x = w.reshape(-1, 16)
    tensor_scale = peak(x).max() / (6 * 448)
    scale = cast(np.maximum(peak(x) / 6 / tensor_scale, 2.0**-9), E4M3) * tensor_scale
    return (cast(x / scale, E2M1) * scale).reshape(w.shape)


def ternary(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).mean(-1, keepdims=True)
    return np.clip(np.round(x / scale), -1, 1) * scale


def binary(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, 1, -1) * np.abs(x).mean(-1, keepdims=True)


def _mx(dtype: type, *, floor: bool) -> Rule:
    return runs(shared_exponent(dtype, floor=floor), 32)


RULES: dict[str, Rule] = {
    "int8 per channel, /127": runs(symmetric(8, 127), None),
    "int4 per channel, asymmetric": runs(asymmetric(4), None),
    "int4 g128, asymmetric": runs(asymmetric(4), 128),
    "int4 g128, /7": runs(symmetric(4, 7), 128),
    "int4 g128, /7.5": runs(symmetric(4, 7.5), 128),
    "int4 g128, /8": runs(symmetric(4, 8), 128),
    "int4 g128, asymmetric, mse": runs(searched(lambda f: asymmetric(4, f)), 128),
    "int4 g128, /7.5, mse": runs(searched(lambda f: symmetric(4, 7.5, f)), 128),
    "int4 g64, asymmetric": runs(asymmetric(4), 64),
    "int4 g32, asymmetric": runs(asymmetric(4), 32),
    "int3 g128, asymmetric": runs(asymmetric(3), 128),
    "int2 g128, asymmetric": runs(asymmetric(2), 128),
    "int2 g64, asymmetric": runs(asymmetric(2), 64),
    "int2 g64, asymmetric, mse": runs(searched(lambda f: asymmetric(2, f)), 64),
    "HQQ 4 bits, 64": runs(half_quadratic(4), 64),
    "HQQ 3 bits, 64": runs(half_quadratic(3, rounded=False), 64),
    "HQQ 2 bits, 64": runs(half_quadratic(2, rounded=False), 64),
    "NF4, 64": runs(table(NF4), 64),
    "NF4, 64, double quantization": nf4_double,
    "NF4, 128": runs(table(NF4), 128),
    "FP4 of bitsandbytes, 64": runs(table(FP4), 64),
    "MXFP4, floor": _mx(E2M1, floor=True),
    "MXFP4, rceil": _mx(E2M1, floor=False),
    "NVFP4": nvfp4,
    "MXFP8 E4M3, floor": _mx(E4M3, floor=True),
    "MXFP8 E4M3, rceil": _mx(E4M3, floor=False),
    "E4M3 per tensor": whole(scaled(E4M3)),
    "E4M3, 1x128": runs(scaled(E4M3), 128),
    "E4M3, 128x128": boxes(scaled(E4M3), 128),
    "E5M2 per tensor": whole(scaled(E5M2)),
    "ternary, mean magnitude per tensor": whole(ternary),
    # Without a published figure.
    "int4 g128, signed /8": runs(signed(4), 128),
    "int4 g64, /7.5": runs(symmetric(4, 7.5), 64),
    "MXFP8 E5M2, floor": _mx(E5M2, floor=True),
    "MXFP6 E3M2, floor": _mx(E3M2, floor=True),
    "MXFP6 E2M3, floor": _mx(E2M3, floor=True),
    "binary, mean magnitude per channel": runs(binary, None),
    "HQQ 4 bits, 64, scales refitted": runs(half_quadratic(4, refit=True), 64),
    "HQQ 3 bits, 64, scales refitted": runs(half_quadratic(3, refit=True), 64),
    "HQQ 2 bits, 64, scales refitted": runs(half_quadratic(2, refit=True), 64),
}
