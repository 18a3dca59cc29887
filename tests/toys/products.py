"""Dimension numbers that the laws of the dot are stated over, and what the products are exactly."""

import dataclasses
import functools
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from quantized import normal, SCHEMES, uneven, values

from jaxquant.ops import dot_general, Refusal
from jaxquant.ops.dot import layout_for
from jaxquant.qarray import QArray, quantize_array, relayout


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, contracted and batch axes; 256 elements are summed. `weight`: which side it is."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    weight: int = 1

    @property
    def numbers(self):
        return self.contracted, self.batch

    @property
    def letters(self) -> str:
        """For `np.einsum`."""
        names = iter(string.ascii_letters)
        sides = [[""] * len(shape) for shape in self.shapes]
        for pairs in (self.contracted, self.batch):
            for left, right in zip(*pairs, strict=True):
                sides[0][left] = sides[1][right] = next(names)
        sides = [[name or next(names) for name in side] for side in sides]
        batch = [sides[0][axis] for axis in self.batch[0]]
        free = [
            name
            for side, c, b in zip(sides, self.contracted, self.batch, strict=True)
            for axis, name in enumerate(side)
            if axis not in c and axis not in b
        ]
        return f"{''.join(sides[0])},{''.join(sides[1])}->{''.join(batch + free)}"


CASES = {
    "rows": Case(((8, 256), (256, 24)), ((1,), (0,))),
    "one row": Case(((1, 256), (256, 24)), ((1,), (0,))),
    "rows of rows": Case(((2, 3, 256), (256, 24)), ((2,), (0,))),
    "weight on the left": Case(((256, 24), (5, 256)), ((0,), (1,)), weight=0),
    "weight stored by output": Case(((5, 256), (24, 256)), ((1,), (1,))),
    "vector": Case(((256,), (256, 24)), ((0,), (0,))),
    "two vectors": Case(((256,), (256,)), ((0,), (0,))),
    "one output": Case(((8, 256), (256, 1)), ((1,), (0,))),
    "several contracted": Case(((5, 4, 64), (4, 64, 24)), ((1, 2), (0, 1))),
    "several in another order": Case(((64, 5, 4), (4, 64, 24)), ((2, 0), (0, 1))),
    "several named backwards": Case(((5, 4, 64), (4, 64, 24)), ((2, 1), (1, 0))),
    "several apart": Case(((5, 4, 64), (4, 24, 64)), ((1, 2), (0, 2))),
    "outputs around": Case(((8, 256), (6, 256, 4)), ((1,), (1,))),
    "outputs around, on the left": Case(((6, 256, 4), (2, 256, 3)), ((1,), (1,)), weight=0),
    "batch": Case(((3, 5, 256), (3, 256, 24)), ((2,), (1,)), ((0,), (0,))),
    "batch in the middle": Case(((5, 3, 256), (256, 3, 24)), ((2,), (0,)), ((1,), (1,))),
    "two batches": Case(((2, 5, 3, 256), (3, 256, 2, 24)), ((3,), (1,)), ((0, 2), (2, 0))),
    "batch, weight on the left": Case(
        ((3, 256, 6), (3, 5, 256)), ((1,), (2,)), ((0,), (0,)), weight=0
    ),
    "batch of vectors": Case(((3, 256), (3, 256)), ((1,), (1,)), ((0,), (0,))),
}


@functools.cache
def plain(case: Case, side: int, dtype: jnp.dtype = jnp.float32) -> Array:
    """One side: Gaussian activations, or a weight of rows and columns that differ in size."""
    fill = uneven if side == case.weight else normal
    return fill(*case.shapes[side], seed=side, dtype=dtype)


@functools.cache
def codes(case: Case, side: int, name: str, dtype: jnp.dtype = jnp.float32) -> QArray:
    """One side under `SCHEMES[name]`. Kept, and made under jit, since compiling takes longest."""
    return jax.jit(
        lambda x: quantize_array(
            x, SCHEMES[name], contracted=case.contracted[side], stack=case.batch[side]
        )
    )(plain(case, side, dtype))


def operands(
    case: Case, activations: str | None, weight: str, dtype: jnp.dtype = jnp.float32
) -> list[Array | QArray]:
    """Both sides; `None` stands for no quantization."""
    names = [weight, weight]
    names[1 - case.weight] = activations
    return [
        plain(case, side, dtype) if name is None else codes(case, side, name, dtype)
        for side, name in enumerate(names)
    ]


def exact(x: Array | QArray) -> np.ndarray:
    """The operand in float64."""
    return values(x) if isinstance(x, QArray) else np.asarray(x).astype(np.float64)


def product(case: Case, lhs: Array | QArray, rhs: Array | QArray) -> np.ndarray:
    """The product in float64."""
    return np.einsum(case.letters, exact(lhs), exact(rhs))


def product_of_sums(case: Case, lhs: QArray, rhs: QArray) -> np.ndarray:
    """The integer sums of the codes, times the scales in float64; a scale for each output."""
    sums = np.einsum(case.letters, *(np.asarray(q.codes).astype(np.int64) for q in (lhs, rhs)))
    once, letters = [], []
    for q, part, axes in zip(
        (lhs, rhs), case.letters.partition("->")[0].split(","), case.contracted, strict=True
    ):
        assert all(q.tile[axis] == q.shape[axis] for axis in axes) and q.zero_point is None
        ones = dataclasses.replace(q, codes=np.ones(q.shape, np.int8))
        index = tuple(0 if a in axes else slice(None) for a in range(q.ndim))
        once.append(values(ones)[index])
        letters.append("".join(c for a, c in enumerate(part) if a not in axes))
    scales = np.einsum(f"{','.join(letters)}->{case.letters.partition('->')[2]}", *once)
    return sums * scales


def bound(case: Case, lhs: Array | QArray, rhs: Array | QArray, halves: bool) -> np.ndarray:
    """How far a product that is summed in float32, in any order, may be from the exact one.

    - `k` roundings of sums and a few of scales: each half an ulp of the sum of magnitudes;
    - activations in fixed point, which are kept to 2^-23 of the largest of their row;
    - in bfloat16 (`halves`), one rounding of each weight and one of the result.
    """
    a, b = np.abs(exact(lhs)), np.abs(exact(rhs))
    k = np.prod([case.shapes[0][axis] for axis in case.contracted[0]])
    magnitude = np.einsum(case.letters, a, b)
    peaks = [
        np.broadcast_to(x.max(axis=c, keepdims=True), x.shape)
        for x, c in zip((a, b), case.contracted, strict=True)
    ]
    fixed = (peaks[0], b) if case.weight else (a, peaks[1])
    total = (k + 8) * 2.0**-24 * magnitude + 2.0**-23 * np.einsum(case.letters, *fixed)
    if halves:
        total = total + 2.0**-8 * magnitude + 2.0**-8 * np.abs(product(case, lhs, rhs))
    return total


def run_or_skip(backend: str, lhs, rhs, numbers, **keywords) -> Array:
    """`dot_general` with a named backend; a refusal skips the test and shows the reason."""
    try:
        return dot_general(lhs, rhs, numbers, backend=backend, **keywords)
    except Refusal as reason:
        pytest.skip(str(reason))


def stored_for(backend: str, case: Case, weight: QArray) -> QArray:
    """The weight in the layout that the backend reads, as `jaxquant.prepare` stores it."""
    layout = layout_for(backend, weight, case.contracted[case.weight], case.batch[case.weight])
    return relayout(weight, layout)
