"""What rounding to each number format costs, against published figures. See README.md."""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from numpy_rules import RULES

from jaxquant.algorithms import assemble, HQQ
from jaxquant.numerics import (
    AbsMax,
    AbsMean,
    Convention,
    E4M3,
    E5M2,
    ExponentRule,
    FLOAT16,
    Format,
    INT4,
    INT8,
    MeanSquaredError,
    MinMax,
    NF4,
    Range,
    SharedExponent,
    TERNARY,
    UINT2,
    UINT3,
    UINT4,
)
from jaxquant.qarray import (
    dequantize,
    PER_CHANNEL,
    PER_TENSOR,
    quantize_array,
    Scheme,
    schemes,
    Tile,
)

HERE = pathlib.Path(__file__).parent
MARGIN = 0.02
"""Ours over the published figure, at the size it was published for."""
NUMPY_MARGIN = 0.001
"""Ours, in float32, over NumPy's float64: codes differ where a value lies within 1e-7 of a tie."""
QUICK_MARGIN = 0.05
"""Gaussian figures of another draw, of a 16th of the size, where tiles do not grow with it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A format, and the published error on normal and on Student's t numbers, if there is one."""

    name: str
    scheme: Scheme
    anchors: tuple[float, float] | None = None
    solver: HQQ | None = None
    """What chooses codes, where it is not rounding to nearest."""


def integers(values: Format, group: int | None, *, mse: bool = False) -> Scheme:
    """Asymmetric integers, with a zero point as wide as the codes."""
    range: Range = MeanSquaredError(base=MinMax()) if mse else MinMax()
    return Scheme(values=values, tile=Tile(contracted=group), range=range, zero_point=values)


def int4(convention: Convention, *, group: int = 128, mse: bool = False) -> Scheme:
    base = AbsMax(convention=convention)
    range = MeanSquaredError(base=base) if mse else base
    return Scheme(values=INT4, tile=Tile(contracted=group), range=range)


def rceil(scheme: Scheme) -> Scheme:
    return dataclasses.replace(scheme, range=SharedExponent(rule=ExponentRule.CEIL))


def box(values: Format, contracted: int, kept: int = 1) -> Scheme:
    return Scheme(values=values, tile=Tile(contracted=contracted, kept=kept))


def row(name: str, scheme: Scheme, *anchors: float, solver: HQQ | None = None) -> Row:
    pair = (anchors[0], anchors[1]) if anchors else None
    return Row(name=name, scheme=scheme, anchors=pair, solver=solver)


def hqq(values: Format) -> Scheme:
    """As the reference stores it: scales and zero points in 16 bits."""
    return dataclasses.replace(integers(values, 64), scale=FLOAT16, zero_point=FLOAT16)


TENSOR_TERNARY = Scheme(values=TERNARY, tile=PER_TENSOR, range=AbsMean())
ROWS = (
    row("int8 per channel, /127", Scheme(values=INT8, tile=PER_CHANNEL), 6.8e-5, 4.8e-4),
    row("int4 per channel, asymmetric", integers(UINT4, None), 0.01760, 0.0879),
    row("int4 g128, asymmetric", integers(UINT4, 128), 0.01011, 0.0211),
    row("int4 g128, /7", int4(Convention.HIGHEST), 0.01378, 0.0371),
    row("int4 g128, /7.5", int4(Convention.MIDDLE), 0.01228, 0.0333),
    row("int4 g128, /8", int4(Convention.LOWEST), 0.01115, 0.0302),
    row("int4 g128, asymmetric, mse", integers(UINT4, 128, mse=True), 0.009066, 0.0192),
    row("int4 g128, /7.5, mse", int4(Convention.MIDDLE, mse=True), 0.01031, 0.0281),
    row("int4 g64, asymmetric", integers(UINT4, 64), 0.008303, 0.0142),
    row("int4 g32, asymmetric", integers(UINT4, 32), 0.006525, 0.00935),
    row("int3 g128, asymmetric", integers(UINT3, 128), 0.04645, 0.0929),
    row("int2 g128, asymmetric", integers(UINT2, 128), 0.2533, 0.367),
    row("int2 g64, asymmetric", integers(UINT2, 64), 0.2090, 0.278),
    row("int2 g64, asymmetric, mse", integers(UINT2, 64, mse=True), 0.1272, 0.1819),
    row("HQQ 4 bits, 64", hqq(UINT4), 0.007547, 0.01274, solver=HQQ()),
    row("HQQ 3 bits, 64", hqq(UINT3), 0.03340, 0.0585, solver=HQQ(round_zero=False)),
    row("HQQ 2 bits, 64", hqq(UINT2), 0.1888, 0.3117, solver=HQQ(round_zero=False)),
    row("NF4, 64", schemes.NF4, 0.008458, 0.01237),
    row("NF4, 64, double quantization", schemes.NF4_DOUBLE, 0.008462, 0.01243),
    row("NF4, 128", box(NF4, 128), 0.009142, 0.01661),
    row("FP4 of bitsandbytes, 64", schemes.FP4, 0.01488, 0.0283),
    row("MXFP4, floor", schemes.MXFP4, 0.01322, 0.0173),
    row("MXFP4, rceil", rceil(schemes.MXFP4), 0.01331, 0.0194),
    row("NVFP4", schemes.NVFP4, 0.009044, 0.00845),
    row("MXFP8 E4M3, floor", schemes.MXFP8_E4M3, 8.61e-4, 1.04e-3),
    row("MXFP8 E4M3, rceil", rceil(schemes.MXFP8_E4M3), 7.04e-4, 7.01e-4),
    row("E4M3 per tensor", Scheme(values=E4M3, tile=PER_TENSOR), 7.02e-4, 7.02e-4),
    row("E4M3, 1x128", box(E4M3, 128), 6.61e-4, 5.76e-4),
    row("E4M3, 128x128", box(E4M3, 128, 128), 7.00e-4, 6.90e-4),
    row("E5M2 per tensor", Scheme(values=E5M2, tile=PER_TENSOR), 2.78e-3, 2.78e-3),
    row("ternary, mean magnitude per tensor", TENSOR_TERNARY, 0.2636, 0.407),
    row("int4 g128, signed /8", int4(Convention.SIGNED)),
    row("int4 g64, /7.5", schemes.INT4_G64),
    row("MXFP8 E5M2, floor", schemes.MXFP8_E5M2),
    row("MXFP6 E3M2, floor", schemes.MXFP6_E3M2),
    row("MXFP6 E2M3, floor", schemes.MXFP6_E2M3),
    row("binary, mean magnitude per channel", schemes.BINARY),
    *(
        row(f"HQQ {v.bits} bits, 64, scales refitted", hqq(v), solver=HQQ(refit_scale=True))
        for v in (UINT4, UINT3, UINT2)
    ),
)
ABSENT = {
    "ggml Q4_0 to Q6_K, TQ2_0": "the encoders of llama.cpp; not built yet",
}


def draws(size: int) -> dict[str, np.ndarray]:
    """Float32 of shape (out, in); groups lie along the last axis."""
    shape = (size, size)
    gauss = np.random.Generator(np.random.PCG64(0)).standard_normal(shape)
    heavy = np.random.Generator(np.random.PCG64(1)).standard_t(4, shape)
    return {"gauss": gauss.astype(np.float32), "heavy": heavy.astype(np.float32)}


def error(rounded: np.ndarray, w: np.ndarray) -> float:
    """Sum of squared errors over sum of squares, in float64."""
    exact = w.astype(np.float64)
    return float(((rounded.astype(np.float64) - exact) ** 2).sum() / (exact**2).sum())


@functools.partial(jax.jit, static_argnames=("scheme", "solver"))
def rounded(w: jax.Array, scheme: Scheme, solver: HQQ | None) -> jax.Array:
    if solver is None:
        return dequantize(quantize_array(w, scheme, contracted=(-1,)))
    made = solver.run(w, {}, scheme)
    parts = made.codes, made.scale, made.zero_point
    return dequantize(
        assemble(*parts, shape=w.shape, dtype=w.dtype, scheme=scheme, contracted=(1,))
    )


def measure(each: Row, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    measured: dict[str, Any] = {"format": each.name, "scheme": str(each.scheme)}
    some = jax.eval_shape(
        lambda w: quantize_array(w, each.scheme, contracted=(-1,)), arrays["gauss"]
    )
    measured["bits_per_value"] = round(some.bits_per_value, 4)
    for draw, w in arrays.items():
        measured[draw] = error(np.asarray(rounded(w, each.scheme, each.solver)), w)
        measured[f"numpy_{draw}"] = error(RULES[each.name](w.astype(np.float64)), w)
    if each.anchors is not None:
        measured |= {"anchor_gauss": each.anchors[0], "anchor_heavy": each.anchors[1]}
    return {
        key: float(f"{value:.5g}") if isinstance(value, float) else value
        for key, value in measured.items()
    }


def failures(each: Row, measured: dict[str, Any], *, quick: bool) -> list[str]:
    """What is further from a published figure, or from NumPy, than it may be."""
    found = []
    grows = None in (each.scheme.tile.contracted, each.scheme.tile.kept)
    for draw in ("gauss", "heavy"):
        checks = [("numpy", NUMPY_MARGIN)]
        if each.anchors is not None and not quick:
            checks.append(("anchor", MARGIN))
        elif each.anchors is not None and draw == "gauss" and not grows:
            checks.append(("anchor", QUICK_MARGIN))
        for kind, margin in checks:
            ratio = measured[draw] / measured[f"{kind}_{draw}"]
            if not abs(ratio - 1) <= margin:
                found.append(f"{each.name}, {draw}: {ratio:.4f} x {kind}, not within {margin:.1%}")
    return found


def show(measured: dict[str, Any]) -> None:
    text = f"{measured['format']:36} {measured['bits_per_value']:6.3f}"
    for draw in ("gauss", "heavy"):
        anchor = measured.get(f"anchor_{draw}")
        ratio = f"{measured[draw] / anchor:6.3f}" if anchor else f"{'':6}"
        text += f"  {measured[draw]:9.4g} {anchor or '':>9} {ratio}"
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="512 x 512; writes elsewhere")
    parser.add_argument("--out", type=pathlib.Path, help="default: results.json beside this file")
    arguments = parser.parse_args()
    if arguments.out is None:
        folder = pathlib.Path(tempfile.mkdtemp()) if arguments.quick else HERE
        arguments.out = folder / "results.json"
    start = time.perf_counter()
    arrays = draws(512 if arguments.quick else 2048)
    print(f"{'format':36} {'bits':>6}  {'gauss':>9} {'theirs':>9} {'ratio':>6}", end="")
    print(f"  {'heavy':>9} {'theirs':>9} {'ratio':>6}")
    measured, wrong = [], []
    for each in ROWS:
        now = measure(each, arrays)
        show(now)
        measured.append(now)
        wrong += failures(each, now, quick=arguments.quick)
    results = {
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "numpy")},
        "shape": list(arrays["gauss"].shape),
        "seconds": round(time.perf_counter() - start, 1),
        "rows": [each for each in measured if "anchor_gauss" in each],
        "without_anchor": [each for each in measured if "anchor_gauss" not in each],
        "absent": ABSENT,
    }
    arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for name, why in ABSENT.items():
        print(f"absent: {name} ({why})")
    print(f"wrote {arguments.out.name}; {len(wrong)} figures out of their margins")
    for line in wrong:
        print(f"  {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
