"""Cases 15 to 22: single arrays and how they are held."""

from typing import Any

import numpy as np
from rounding import (
    binary,
    E4M3,
    mxfp4,
    NF4,
    nvfp4,
    peak,
    relative_error,
    signed,
)
from verdict import Case, Outputs, Verdict

Arrays = dict[str, np.ndarray]
SHAPE = (512, 256)
"""Axis 0 is contracted."""
MARGIN = 1.05
DRAWS = 1024
# Hoeffding: a mean of 1024 draws, each one of two neighbours, is off by more than 6 standard
# deviations of a fair coin with a chance of at most 2 exp(-18) = 3e-8, or 1e-4 for all that are
# looked at.
STANDARD_ERRORS = 6.0
ROUNDED = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "e4m3")
ASYMMETRIC = (*ROUNDED[:6], "nf4", "e4m3")


def _gauss(seed: int, std: float = 1.0, shape: tuple[int, ...] = SHAPE) -> Arrays:
    w = std * np.random.default_rng(seed).standard_normal(shape)
    return {"w": w.astype(np.float32)}


def _at_most(
    outputs: Outputs, w: np.ndarray, error_limit: float, bits_limit: float | None = None
) -> Verdict:
    """Judges the relative error, and the bits that a value takes."""
    error = relative_error(outputs["values"], w)
    good, said = error <= error_limit, f"error {error:.3g}"
    measured = {"error": error, "error_limit": error_limit}
    if bits_limit is not None:
        bits = float(outputs["bits"])
        good, said = good and bits <= bits_limit, f"{said}, {bits:.3f} bits"
        measured |= {"bits": bits, "bits_limit": bits_limit}
    return Verdict(ok=bool(good), said=said, measured=measured)


def _judge_15(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    w = inputs["w"]
    return _at_most(outputs, w, MARGIN * relative_error(nvfp4(w), w))


def _judge_16(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    w = inputs["w"]
    if part == "nvfp4":
        # One float32 for the whole array beside a byte for each 16 values.
        return _at_most(outputs, w, MARGIN * relative_error(nvfp4(w), w), 4.5 + 32 / w.size)
    rules = (relative_error(mxfp4(w, up=up), w) for up in (False, True))
    return _at_most(outputs, w, MARGIN * max(rules), 4.25)


def _gaps(x: np.ndarray, part: str) -> np.ndarray:
    """How far the two values are apart between which each `x` lies; one scale for all."""
    largest = peak(x, (0,))
    if part != "e4m3":
        return np.broadcast_to(largest / (2 ** (int(part[3:]) - 1) - 1), x.shape)
    above = np.searchsorted(E4M3, np.abs(x) / (largest / E4M3.max()))
    return np.diff(E4M3)[above - 1] * (largest / E4M3.max())


def _judge_17(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    x = np.asarray(inputs["w"], np.float64)
    # Libraries differ in what the outermost codes stand for, so those are left out.
    inner = (np.abs(x) <= 0.5 * peak(x, (0,))) & (x != 0)
    allowed = STANDARD_ERRORS * 0.5 * _gaps(x, part) / np.sqrt(DRAWS)
    # Of float32, in which the draws were averaged.
    allowed = allowed + 1e-6 * peak(x, (0,))
    off = float((np.abs(outputs["mean"] - x) / allowed)[inner].max()) * STANDARD_ERRORS
    return Verdict(
        ok=bool(off <= STANDARD_ERRORS),
        said=f"bias of {off:.1f} standard errors",
        measured={"standard_errors": off, "standard_errors_limit": STANDARD_ERRORS},
    )


def _in_steps(values: np.ndarray, w: np.ndarray, steps: np.ndarray, limit: float) -> Verdict:
    """Judges the largest error in units of `steps`."""
    values = np.asarray(values, np.float64)
    if values.shape != w.shape or not np.isfinite(values).all():
        off = float("inf")
    else:
        off = float((np.abs(values - np.asarray(w, np.float64)) / steps).max())
    return Verdict(
        ok=off <= limit,
        said=f"{off:.3f} steps",
        measured={"steps": off, "steps_limit": limit},
    )


def _judge_18(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    w = inputs["w"]
    verdict = _in_steps(outputs["values"], w, peak(w, (0,)), 0.5 * (1 + 1e-6))
    bits, limit = float(outputs["bits"]), 2 + 32 / SHAPE[0]
    return Verdict(
        ok=verdict.ok and bits <= limit,
        said=f"{verdict.said}, {bits:.3f} bits",
        measured=verdict.measured | {"bits": bits, "bits_limit": limit},
    )


def _judge_19(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    w = inputs["w"]
    return _at_most(outputs, w, MARGIN * relative_error(binary(w, (0,)), w))


def _skewed() -> Arrays:
    # Flat, so that least, largest and mean are known well: -1/4, 1, 3/8.
    w = np.random.default_rng(20).uniform(-0.25, 1.0, SHAPE)
    return {"w": w.astype(np.float32)}


def _judge_20(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    w = inputs["w"]
    if part.startswith("int"):
        values = np.arange(2.0 ** int(part[3:]))
    else:
        values = {"nf4": NF4, "e4m3": signed(E4M3)}[part]
    widest = np.diff(values).max() / (values[-1] - values[0])
    steps = np.full(w.shape, widest * (w.max() - w.min()))
    return _in_steps(outputs["values"], w, steps, 0.5 * MARGIN)


def _judge_21(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    w = inputs["w"]
    return _in_steps(outputs["values"], w, peak(w, (0,)) * np.diff(NF4).max(), 0.5 * (1 + 1e-6))


def _judge_22(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    # 1 % for float32's own roundings of quotients up to 127.
    verdict = _in_steps(outputs["values"], inputs["w"], peak(inputs["w"], (0,)) / 127, 0.505)
    dtype = str(outputs["scale_dtype"])
    return Verdict(
        ok=verdict.ok,
        said=f"{verdict.said}, {dtype}",
        measured=verdict.measured | {"scale_dtype": dtype},
    )


def _bfloat16() -> Arrays:
    """Values that bfloat16 holds exactly: float32 with the lower half of each zero."""
    bits = _gauss(22)["w"].view(np.uint32) & np.uint32(0xFFFF0000)
    return {"w": bits.view(np.float32)}


def _one(seed: int, **settings: Any) -> Any:
    return lambda part: _gauss(seed, **settings)


ARRAY_CASES = (
    Case(
        number=15,
        title="NVFP4 of small weights",
        criterion=(
            "Relative error at most 1.05 times that of NVFP4 with a second-level scale in float64, "
            "on weights of both sizes."
        ),
        parts=("std 1", "std 1e-3"),
        inputs=lambda part: _gauss(15, float(part.removeprefix("std "))),
        judge=_judge_15,
    ),
    Case(
        number=16,
        title="Bits of MXFP4 and NVFP4",
        criterion=(
            "Codes and scales take 4.25 (MXFP4) and 4.5 bits a value (NVFP4, and one float32 for "
            "all), counted by their dtypes; relative error at most 1.05 times float64's."
        ),
        parts=("mxfp4", "nvfp4"),
        inputs=_one(16),
        judge=_judge_16,
    ),
    Case(
        number=17,
        title="Stochastic rounding",
        criterion=(
            "The mean of 1024 draws is within 6 standard errors of every value that lies in the "
            "inner half of the range (a fair coin's between two neighbours: the widest there is)."
        ),
        parts=ROUNDED,
        inputs=_one(17, shape=(512,)),
        judge=_judge_17,
    ),
    Case(
        number=18,
        title="int2 in 2 bits",
        criterion=(
            "Off by at most half the largest magnitude of the channel; 2 bits a value and a "
            "float32 a channel, in the smallest form that the library offers."
        ),
        parts=("int2",),
        inputs=_one(18),
        judge=_judge_18,
    ),
    Case(
        number=19,
        title="One bit a value",
        criterion="Relative error at most 1.05 times that of sign times mean magnitude.",
        parts=("1 bit",),
        inputs=_one(19),
        judge=_judge_19,
    ),
    Case(
        number=20,
        title="Asymmetric int2-7, NF4, E4M3",
        criterion=(
            "Values from -1/4 to 1, one scale: off by at most half of the format's widest gap laid "
            "over that range, and 5 %. NF4 and E4M3 have no zero code to shift, so that refusing "
            "them counts against a library only if the other one holds them."
        ),
        parts=ASYMMETRIC,
        inputs=lambda part: _skewed(),
        judge=_judge_20,
        may_refuse=("nf4", "e4m3"),
    ),
    Case(
        number=21,
        title="NF4 loaded into a float model",
        criterion="Off by at most half of NF4's widest gap, times the channel's largest magnitude.",
        parts=("nf4",),
        inputs=_one(21),
        judge=_judge_21,
    ),
    Case(
        number=22,
        title="int8 of bfloat16 weights",
        criterion="Off by at most 0.505 of the channel's largest magnitude over 127.",
        parts=("bfloat16",),
        inputs=lambda part: _bfloat16(),
        judge=_judge_22,
    ),
)
