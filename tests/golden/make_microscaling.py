"""Writes `microscaling.npz` and `nvfp4.npz`: what torchao and ggml make of a few arrays, on a CPU.

Beside them stands the OCP rule in NumPy float64, written from the specification; it is compared
with both here, and every disagreement is printed. README.md has versions, command and the list.
"""

import pathlib

import libgguf
import ml_dtypes
import numpy as np
import torch
import torchao
from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import unpack_uint4

HERE = pathlib.Path(__file__).parent
ELEMENTS = {
    "e4m3": (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn),
    "e5m2": (ml_dtypes.float8_e5m2, torch.float8_e5m2),
    "e3m2": (ml_dtypes.float6_e3m2fn, mx_tensor.DTYPE_FP6_E3M2),
    "e2m3": (ml_dtypes.float6_e2m3fn, mx_tensor.DTYPE_FP6_E2M3),
    "e2m1": (ml_dtypes.float4_e2m1fn, torch.float4_e2m1fn_x2),
}
MODES = {
    "floor": ScaleCalculationMode.FLOOR,
    "rceil": ScaleCalculationMode.RCEIL,
    "even": ScaleCalculationMode.EVEN,
}


def table(dtype: type) -> np.ndarray:
    """The finite values that are not negative, in order, which is that of their codes."""
    codes = np.arange(2 ** (ml_dtypes.finfo(dtype).bits - 1), dtype=np.uint8)
    values = codes.view(dtype).astype(np.float64)
    return values[np.isfinite(values)]


def to_nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Rounds to nearest, ties to the even code, past the end to the end; exact in float64."""
    size = np.abs(x)
    right = np.clip(np.searchsorted(values, size), 1, len(values) - 1)
    left = right - 1
    below, above = size - values[left], values[right] - size
    up = (above < below) | ((above == below) & (right % 2 == 0))
    return np.copysign(values[np.where(up, right, left)], x)


def ocp(x: np.ndarray, values: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """OCP MX v1.0, section 6.3 (floor), or the least power of two that saturates nothing (rceil).

    Or section 6.3's of the magnitude rounded to the format's bits, halves upwards (even).

    Tiles of 32 along the last axis; returns the exponents of their scales and the values.
    """
    tiles = x.astype(np.float64).reshape(-1, 32)
    peak = np.abs(tiles).max(-1, keepdims=True)
    mantissa, exponent = np.frexp(np.where(peak == 0, 2.0**-200, peak))  # peak = m 2^e, m >= 1/2
    if mode == "floor":
        exponent = exponent - 1 - (np.frexp(values[-1])[1] - 1)
    elif mode == "even":
        steps = float(np.sum((values >= 1) & (values < 2)))  # from one power of two to the next
        rounded = np.floor(2 * steps * mantissa + 0.5) / (2 * steps)
        exponent = exponent - 1 + (rounded == 1) - (np.frexp(values[-1])[1] - 1)
    else:
        mantissa, exponent = np.frexp(np.where(peak == 0, 2.0**-200, peak) / values[-1])
        exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = np.clip(exponent, -127, 127)
    return exponent.ravel(), (np.ldexp(to_nearest(np.ldexp(tiles, -exponent), values), exponent))


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(7))
    gauss, heavy = rng.standard_normal((4, 128)), rng.standard_t(4, (4, 128))
    zeros = rng.standard_normal((2, 128))
    zeros[0, :64] = 0
    zeros[1, 32:48] = 0
    made = {
        "gauss": gauss,
        "heavy": heavy,
        "tiny": 1e-6 * gauss[:1],
        "huge": 1e30 * heavy[:1],
        "largest": 3e38 * np.sign(gauss[:1]) * rng.uniform(0.2, 1, (1, 128)),
        "least": 1e-37 * gauss[:1],
        "subnormal": 1e-39 * gauss[:1],
        "zero": np.zeros((1, 128)),
        "zeros": zeros,
        "wide": gauss[:2] * np.repeat(10.0 ** -np.arange(16.0), 16).reshape(2, 128),
    }
    for name, (dtype, _) in ELEMENTS.items():
        made[f"ties_{name}"] = ties(table(dtype))
    return {name: x.astype(np.float32) for name, x in made.items()}


def ties(values: np.ndarray) -> np.ndarray:
    """Tiles of 32 with the largest value, so that scales are 1, and every midpoint of the format.

    The last ones stand past the largest value, where a cast saturates or does not.
    """
    past = values[-1] + (values[-1] - values[-2]) * np.array([0.25, 0.5, 0.75])
    middles = np.concatenate([(values[:-1] + values[1:]) / 2, past])
    count = -(-len(middles) // 31)
    count += -count % 4  # whole rows of 128
    body = np.resize(middles, (count, 31)) * np.where(np.arange(31) % 2, -1, 1)
    return np.concatenate([np.full((count, 1), values[-1]), body], 1).reshape(-1, 128)


def compare(what: str, got: np.ndarray, wanted: np.ndarray, case_of: np.ndarray) -> None:
    """Prints how many values of each case differ; NaN differs from everything."""
    differ = (got.astype(np.float64) != wanted).any(-1) if got.ndim > 1 else got != wanted
    for case in dict.fromkeys(case_of):
        if count := int(differ[case_of == case].sum()):
            print(f"{what}: {count} of {(case_of == case).sum()} tiles of {str(case)!r} differ")


def microscaling(x: np.ndarray, case_of: np.ndarray) -> dict[str, np.ndarray]:
    """Scales and codes of every format and rule; float64 agrees but where it prints."""
    kept = {}
    tiles_of = np.repeat(case_of, x.shape[-1] // 32)
    for name, (dtype, element) in ELEMENTS.items():
        for mode, how in MODES.items():
            scale, codes = mx_tensor.to_mx(torch.from_numpy(x), element, 32, how)
            if name == "e2m1":
                codes = unpack_uint4(codes)
            key = f"{name}.{mode}"
            kept[f"{key}.scale"] = scale.view(torch.uint8).numpy()
            kept[f"{key}.codes"] = codes.view(torch.uint8).numpy()
            values = kept[f"{key}.codes"].view(dtype).astype(np.float64).reshape(-1, 32)
            exponents = kept[f"{key}.scale"].astype(int).ravel() - 127
            wanted_exponents, wanted = ocp(x, table(dtype), mode)
            compare(f"torchao {key}", np.ldexp(values, exponents[:, None]), wanted, tiles_of)
            compare(f"torchao {key} exponents", exponents, wanted_exponents, tiles_of)
    kept["ggml"] = libgguf.quantize_rows(x, libgguf.GGMLQuantizationType.MXFP4)
    got = libgguf.dequantize_rows(kept["ggml"], libgguf.GGMLQuantizationType.MXFP4)
    wanted = ocp(x, table(ELEMENTS["e2m1"][0]), "floor")[1]
    compare("ggml e2m1.floor", got.reshape(-1, 32), wanted, tiles_of)
    return kept


def nvfp4(x: np.ndarray, case_of: np.ndarray) -> dict[str, np.ndarray]:
    """Two levels as torchao does it, each case a tensor, and the one level of torchao and ggml."""
    names = list(dict.fromkeys(case_of))
    kept = {"tensor_scale": np.zeros(len(names), np.float32)}
    for level in ("two", "one"):
        kept[f"{level}.scale"] = np.zeros((len(x), x.shape[-1] // 16), np.uint8)
        kept[f"{level}.codes"] = np.zeros(x.shape, np.uint8)
    for i, case in enumerate(names):
        rows = case_of == case
        tensor = torch.from_numpy(x[rows])
        whole = nvfp4_tensor.per_tensor_amax_to_scale(tensor.abs().max())
        kept["tensor_scale"][i] = whole
        for level, given in (("two", whole), ("one", None)):
            if given is not None and given == 0:
                continue  # 0 / 0 in torchao: scales and codes stay 0 here
            scale, packed = nvfp4_tensor.nvfp4_quantize(tensor, 16, given)
            kept[f"{level}.scale"][rows] = scale.view(torch.uint8).numpy()
            kept[f"{level}.codes"][rows] = unpack_uint4(packed).numpy()
    kept["ggml"] = libgguf.quantize_rows(x, libgguf.GGMLQuantizationType.NVFP4)
    return kept


def main() -> None:
    versions = f"torchao {torchao.__version__}, torch {torch.__version__}, libgguf 0.2.2"
    cases = inputs()
    x = np.concatenate(list(cases.values()))
    case_of = np.concatenate([[name] * len(rows) for name, rows in cases.items()])
    head = {"versions": np.array(versions), "x": x, "case_of": case_of}
    np.savez_compressed(HERE / "microscaling.npz", **head, **microscaling(x, case_of))
    np.savez_compressed(HERE / "nvfp4.npz", **head, **nvfp4(x, case_of))


if __name__ == "__main__":
    main()
