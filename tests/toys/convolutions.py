"""Convolutions that the laws are stated over, and what they are exactly, by NumPy alone."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from quantized import normal, SCHEMES, uneven, values

from jaxquant.qarray import QArray, quantize_array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Stored shapes of images and kernel, the letters of their axes, and how windows move."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    letters: tuple[str, str, str]
    strides: tuple[int, ...]
    padding: Any = "SAME"
    lhs_dilation: tuple[int, ...] | None = None
    rhs_dilation: tuple[int, ...] | None = None
    groups: int = 1
    batch_groups: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """Keywords of `conv_general_dilated`."""
        return dict(
            window_strides=self.strides,
            padding=self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            dimension_numbers=self.letters,
            feature_group_count=self.groups,
            batch_group_count=self.batch_groups,
        )

    def summed(self, side: int) -> tuple[int, ...]:
        kept = "NO"[side]
        return tuple(a for a, c in enumerate(self.letters[side]) if c != kept)

    @property
    def products(self) -> int:
        return math.prod(self.shapes[1][a] for a in self.summed(1))


NHWC, NWC = ("NHWC", "HWIO", "NHWC"), ("NWC", "WIO", "NWC")
SMALL = (2, 6, 7, 4)

CASES = {
    "1-D": Case(shapes=((3, 12, 8), (3, 8, 16)), letters=NWC, strides=(1,)),
    "2-D": Case(shapes=(SMALL, (3, 3, 4, 6)), letters=NHWC, strides=(1, 1)),
    "1x1": Case(shapes=(SMALL, (1, 1, 4, 6)), letters=NHWC, strides=(1, 1)),
    "even window": Case(shapes=(SMALL, (2, 4, 4, 6)), letters=NHWC, strides=(1, 2)),
    "no padding": Case(shapes=(SMALL, (3, 2, 4, 6)), letters=NHWC, strides=(2, 1), padding="VALID"),
    "NCHW strided": Case(
        shapes=((2, 4, 6, 7), (6, 4, 3, 3)),
        letters=("NCHW", "OIHW", "NCHW"),
        strides=(2, 1),
        padding=((1, 2), (0, 1)),
    ),
    "mixed orders": Case(
        shapes=((4, 6, 7, 2), (6, 3, 4, 3)),
        letters=("CHWN", "OHIW", "HNWC"),
        strides=(1, 2),
    ),
    "dilated": Case(
        shapes=(SMALL, (2, 3, 4, 6)),
        letters=NHWC,
        strides=(1, 1),
        padding=((2, 2), (3, 3)),
        rhs_dilation=(2, 3),
    ),
    "transposed": Case(
        shapes=(SMALL, (3, 3, 4, 6)),
        letters=NHWC,
        strides=(1, 1),
        padding=((1, 2), (2, 1)),
        lhs_dilation=(2, 2),
    ),
    "grouped": Case(shapes=(SMALL, (3, 3, 2, 6)), letters=NHWC, strides=(1, 1), groups=2),
    "depthwise": Case(shapes=(SMALL, (3, 3, 1, 8)), letters=NHWC, strides=(2, 2), groups=4),
    "batch groups": Case(
        shapes=((4, 6, 7, 4), (3, 3, 4, 6)), letters=NHWC, strides=(1, 1), batch_groups=2
    ),
    "3-D": Case(
        shapes=((1, 4, 3, 5, 2), (2, 2, 3, 2, 4)),
        letters=("NDHWC", "DHWIO", "NDHWC"),
        strides=(1, 1, 2),
    ),
}


@functools.cache
def plain(case: Case, side: int, dtype: Any = jnp.float32) -> Array:
    """Gaussian images, or a kernel whose rows and columns differ in size."""
    return (uneven if side else normal)(*case.shapes[side], seed=side, dtype=dtype)


@functools.cache
def codes(case: Case, side: int, name: str, dtype: Any = jnp.float32) -> QArray:
    """One side under `SCHEMES[name]`."""
    run = jax.jit(lambda x: quantize_array(x, SCHEMES[name], contracted=case.summed(side)))
    return run(plain(case, side, dtype))


def operands(case: Case, activations: str | None, weight: str | None, dtype: Any = jnp.float32):
    """Both sides; `None` stands for no quantization."""
    return [
        plain(case, side, dtype) if name is None else codes(case, side, name, dtype)
        for side, name in enumerate((activations, weight))
    ]


def exact(x: Array | QArray) -> np.ndarray:
    """The operand in float64."""
    return values(x) if isinstance(x, QArray) else np.asarray(x).astype(np.float64)


def convolution(case: Case, lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """The convolution in the dtype of its operands, one place of the kernel after the other."""
    order = [
        [letters.index(c) for c in first] + _spatial(case, side)
        for side, letters, first in ((0, case.letters[0], "NC"), (1, case.letters[1], "OI"))
    ]
    x, w = lhs.transpose(order[0]), rhs.transpose(order[1])
    count = x.ndim - 2
    steps = case.rhs_dilation or (1,) * count
    x = _dilated(x, case.lhs_dilation or (1,) * count)
    reach = [(n - 1) * step + 1 for n, step in zip(w.shape[2:], steps, strict=True)]
    x = np.pad(x, [(0, 0), (0, 0), *_pads(case, x.shape[2:], reach)])
    sizes = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, case.strides, strict=True)]
    g, b, outputs = case.groups, case.batch_groups, w.shape[0]
    x = x.reshape(b, x.shape[0] // b, g, x.shape[1] // g, *x.shape[2:])
    w = w.reshape(b, g, outputs // (b * g), *w.shape[1:])
    total: Any = 0
    for place in itertools.product(*map(range, w.shape[4:])):
        window = tuple(
            slice(k * step, k * step + (n - 1) * stride + 1, stride)
            for k, step, n, stride in zip(place, steps, sizes, case.strides, strict=True)
        )
        part = np.einsum("bngi...,bgoi->nbgo...", x[(..., *window)], w[(..., *place)])
        total = total + part
    total = total.reshape(total.shape[0], outputs, *total.shape[4:])
    out = ["NC".index(c) if c in "NC" else 2 + _names(case).index(c) for c in case.letters[2]]
    return total.transpose(out)


def _names(case: Case) -> list[str]:
    return [c for c in case.letters[1] if c not in "OI"]


def _spatial(case: Case, side: int) -> list[int]:
    return [case.letters[side].index(c) for c in _names(case)]


def _dilated(x: np.ndarray, by: tuple[int, ...]) -> np.ndarray:
    shape = [(n - 1) * d + 1 for n, d in zip(x.shape[2:], by, strict=True)]
    wide = np.zeros((*x.shape[:2], *shape), x.dtype)
    wide[(slice(None), slice(None), *(slice(None, None, d) for d in by))] = x
    return wide


def _pads(case: Case, sizes: Any, reach: list[int]) -> list[tuple[int, int]]:
    if case.padding == "VALID":
        return [(0, 0)] * len(reach)
    if case.padding != "SAME":
        # In the order of the spatial axes of the images, which is that of the kernel here.
        return list(case.padding)
    pads = []
    for n, r, stride in zip(sizes, reach, case.strides, strict=True):
        total = max((-(-n // stride) - 1) * stride + r - n, 0)
        pads.append((total // 2, total - total // 2))
    return pads


def bound(case: Case, lhs: Array | QArray, rhs: Array | QArray, halves: bool = False) -> np.ndarray:
    """How far a convolution that is summed in float32, in any order, may be from the exact one.

    As many roundings as products and a few of scales, each half an ulp of the sum of magnitudes;
    in bfloat16 (`halves`), one rounding of each factor and one of the result.
    """
    magnitude = convolution(case, np.abs(exact(lhs)), np.abs(exact(rhs)))
    total = (case.products + 8) * 2.0**-24 * magnitude
    return total + (2.0**-7 * magnitude if halves else 0)
