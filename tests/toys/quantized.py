"""Schemes, layouts and arrays that the laws are stated over. A new scheme is one row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.numerics import AbsMax, BFLOAT16, Convention, E4M3, E5M2, FLOAT16, INT4, INT8, MinMax
from jaxquant.qarray import (
    CANONICAL,
    Layout,
    PER_CHANNEL,
    PER_TENSOR,
    QArray,
    quantize_array,
    Scheme,
    Tile,
)

G32, G64, G128 = (Tile(contracted=size) for size in (32, 64, 128))
BLOCK = Tile(contracted=128, kept=128)
MIDDLE, LOWEST, SIGNED = (
    AbsMax(convention=c) for c in (Convention.MIDDLE, Convention.LOWEST, Convention.SIGNED)
)

SCHEMES: dict[str, Scheme] = {
    "int8 channel": Scheme(values=INT8, tile=PER_CHANNEL),
    "int8 tensor": Scheme(values=INT8, tile=PER_TENSOR),
    "int8 g128 bfloat16": Scheme(values=INT8, tile=G128, scale=BFLOAT16),
    "int8 middle g32": Scheme(values=INT8, tile=G32, range=MIDDLE),
    "int8 block": Scheme(values=INT8, tile=BLOCK),
    "int8 zero channel": Scheme(values=INT8, tile=PER_CHANNEL, range=MinMax(), zero_point=INT8),
    "int4 channel": Scheme(values=INT4, tile=PER_CHANNEL),
    "int4 g32 bfloat16": Scheme(values=INT4, tile=G32, scale=BFLOAT16),
    "int4 middle g64": Scheme(values=INT4, tile=G64, range=MIDDLE),
    "int4 lowest g128 float16": Scheme(values=INT4, tile=G128, range=LOWEST, scale=FLOAT16),
    "int4 signed g32": Scheme(values=INT4, tile=G32, range=SIGNED),
    "int4 zero g64": Scheme(values=INT4, tile=G64, range=MinMax(), zero_point=INT4),
    "int4 wide zero g32 bfloat16": Scheme(
        values=INT4, tile=G32, range=MinMax(), zero_point=INT8, scale=BFLOAT16
    ),
    "e4m3 channel": Scheme(values=E4M3, tile=PER_CHANNEL),
    "e4m3 g64 bfloat16": Scheme(values=E4M3, tile=G64, scale=BFLOAT16),
    "e4m3 block": Scheme(values=E4M3, tile=BLOCK),
    "e5m2 tensor": Scheme(values=E5M2, tile=PER_TENSOR),
}


def layouts(scheme: Scheme, last: int, first: int) -> list[Layout]:
    """Every kind of layout for a matrix of `first x last` codes of `scheme`."""
    found = [CANONICAL, Layout(order=(-1, -2))]
    if scheme.values.integer:
        found += [Layout(wide=True), Layout(order=(-1, -2), wide=True)]
    if scheme.values.packs:
        found += [Layout(packed=last), Layout(packed=2), Layout(order=(-1, -2), packed=first // 4)]
    return found


def normal(*shape: int, seed: int = 0, dtype: jnp.dtype = jnp.float32) -> Float[Array, "..."]:
    """Gaussian numbers."""
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(numbers.astype(np.float32)).astype(dtype)


def uneven(*shape: int, seed: int = 0, dtype: jnp.dtype = jnp.float32) -> Float[Array, "..."]:
    """Gaussian numbers whose magnitude differs between rows and columns by up to 2^12."""
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal(shape)
    for axis, size in enumerate(shape):
        factors = 2.0 ** rng.uniform(-3, 3, size)
        numbers = numbers * factors.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return jnp.asarray(numbers.astype(np.float32)).astype(dtype)


@functools.cache
def codes_of(
    scheme: Scheme,
    *shape: int,
    contracted: tuple[int, ...] = (0,),
    stack: tuple[int, ...] = (),
    seed: int = 0,
) -> QArray:
    """`uneven` numbers under a scheme. Kept, and made under jit, since compiling takes longest."""
    run = jax.jit(lambda x: quantize_array(x, scheme, contracted=contracted, stack=stack))
    return run(uneven(*shape, seed=seed))


def values(q: QArray) -> np.ndarray:
    """What `q` stands for, in float64 and by NumPy alone: the definition, once more."""
    codes = np.asarray(q.codes)
    if q.layout.packed is not None:
        blocks = codes.reshape(*codes.shape[:-1], -1, q.layout.packed // 2)
        nibbles = np.concatenate([blocks & 15, blocks >> 4], axis=-1).astype(np.int64)
        codes = (nibbles - 16 * (nibbles > 7)).reshape(*codes.shape[:-1], -1)
    codes = codes.astype(np.float64)
    for axis, (n, groups) in enumerate(zip(codes.shape, q.scale.shape, strict=True)):
        assert n % groups == 0, (axis, n, groups)

    def over_tiles(part: Array) -> np.ndarray:
        wide = np.asarray(part).astype(np.float64)
        for axis, (n, groups) in enumerate(zip(codes.shape, part.shape, strict=True)):
            wide = np.repeat(wide, n // groups, axis=axis)
        return wide

    if q.zero_point is not None:
        codes = codes - over_tiles(q.zero_point)
    stored = codes * over_tiles(q.scale)
    return stored.transpose(np.argsort(q.layout.permutation(q.ndim)))


def same_bits(a: object, b: object) -> bool:
    """Whether two arrays hold the same bytes (so that -0 is not 0, and NaN is NaN)."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
