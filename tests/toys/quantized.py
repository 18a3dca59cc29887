"""Schemes, layouts and arrays that the laws are stated over. A new scheme is one row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from code_values import every_value, unpacked, values_of
from jaxtyping import Array, Float

from jaxquant.numerics import (
    AbsMax,
    BFLOAT16,
    Convention,
    E4M3,
    E5M2,
    Fixed,
    FLOAT16,
    Format,
    INT2,
    INT3,
    INT4,
    INT5,
    INT6,
    INT8,
    least_block,
    MeanSquaredError,
    MinMax,
    Percentile,
    RootMeanSquare,
    UINT4,
)
from jaxquant.qarray import (
    CANONICAL,
    Layout,
    PER_CHANNEL,
    PER_TENSOR,
    QArray,
    quantize_array,
    Scheme,
    schemes,
    Tile,
)

G32, G64, G128 = (Tile(contracted=size) for size in (32, 64, 128))
BLOCK = Tile(contracted=128, kept=128)
# No shape of these tests is a multiple of either.
RAGGED_BLOCK = Tile(contracted=96, kept=80, ragged=True)
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
    "mxfp8": schemes.MXFP8_E4M3,
    "mxfp6 e3m2": schemes.MXFP6_E3M2,
    "mxfp6 e2m3": schemes.MXFP6_E2M3,
    "mxfp4": schemes.MXFP4,
    "nvfp4": schemes.NVFP4,
    "nf4": schemes.NF4,
    "nf4 double": schemes.NF4_DOUBLE,
    "fp4": schemes.FP4,
    "ternary": schemes.TERNARY,
    "binary": schemes.BINARY,
    "int2 zero g64": Scheme(values=INT2, tile=G64, range=MinMax(), zero_point=INT2),
    "int3 g32": Scheme(values=INT3, tile=G32, scale=Scheme(values=INT6, tile=PER_CHANNEL)),
    "int5 channel": Scheme(values=INT5, tile=PER_CHANNEL),
    "uint4 zero g64": Scheme(values=UINT4, tile=G64, range=MinMax(), zero_point=UINT4),
    "uint4 real zero g64": Scheme(
        values=UINT4, tile=G64, range=MinMax(), zero_point=FLOAT16, scale=FLOAT16
    ),
    "int8 real zero channel": Scheme(
        values=INT8, tile=PER_CHANNEL, range=MinMax(), zero_point=BFLOAT16
    ),
    "int6 ragged g100": Scheme(values=INT6, tile=Tile(contracted=100, ragged=True)),
    "e4m3 ragged block": Scheme(values=E4M3, tile=RAGGED_BLOCK, scale=BFLOAT16),
    "int4 percentile": Scheme(values=INT4, tile=G64, range=Percentile(percent=95.0)),
    "int4 mse": Scheme(values=INT4, tile=G64, range=MeanSquaredError(base=AbsMax(), grid=20)),
    "int8 rms": Scheme(values=INT8, tile=G128, range=RootMeanSquare(multiple=3.0)),
    "int8 fixed": Scheme(values=INT8, tile=PER_CHANNEL, range=Fixed(low=-4.0, high=8.0)),
}


def nested(scheme: Scheme) -> bool:
    """Whether scales are themselves held as codes."""
    return isinstance(scheme.scale, Scheme)


def centered(scheme: Scheme) -> bool:
    """Whether anything is added to what codes stand for, of values or of scales."""
    return scheme.centered or nested(scheme) and centered(scheme.scale)


def layouts(scheme: Scheme, last: int, first: int) -> list[Layout]:
    """Every kind of layout for a matrix of `first x last` codes of `scheme`."""
    found = [CANONICAL, Layout(order=(-1, -2))]
    if scheme.values.integer:
        found += [Layout(wide=True), Layout(order=(-1, -2), wide=True)]
    if scheme.values.packs:
        found += [Layout(packed=last), Layout(packed=least_block(scheme.values))]
        found += [Layout(order=(-1, -2), packed=first // 4)]
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
    """What `q` stands for, in float64 and by NumPy alone: the definition, once more.

    Scales are float32 numbers, so those that are held as codes are rounded to that.
    """
    codes = q.codes if q.layout.packed is None else unpacked_codes(q)
    numbers = values_of(codes, q.scheme.values)
    if q.zero_point is not None:
        numbers = numbers - over_codes(q, np.asarray(q.zero_point).astype(np.float64))
    numbers = numbers * over_codes(q, scales(q))
    if q.offset is not None:
        # The only sum of two numbers that float32 does not hold: of the rounded product.
        offset = np.asarray(q.offset).astype(np.float64)
        numbers = (numbers.astype(np.float32).astype(np.float64) + offset).astype(np.float32)
        numbers = numbers.astype(np.float64)
    return numbers.transpose(np.argsort(q.layout.permutation(q.ndim)))


def unpacked_codes(q: QArray) -> np.ndarray:
    """The bits of packed codes, in stored order."""
    assert q.codes.dtype == np.uint8
    return unpacked(np.asarray(q.codes), q.scheme.values.bits, q.layout.packed)


def scales(q: QArray) -> np.ndarray:
    """The scales of `q` in float64, in stored order."""
    if isinstance(q.scheme.scale, Format):
        return values_of(np.asarray(q.scale), q.scheme.scale)
    return values(q.scale).astype(np.float32).astype(np.float64)


def over_codes(q: QArray, part: np.ndarray) -> np.ndarray:
    """What each code has of a part with one number a tile, in stored order; ends may be short."""
    shape = list(np.shape(q.codes))
    if q.layout.packed is not None:
        shape[-1] = shape[-1] * 8 // q.scheme.values.bits
    short = dict(q.ragged)
    for axis, (n, tiles) in enumerate(zip(shape, part.shape, strict=True)):
        tile = short.get(axis - len(shape), n // max(tiles, 1))
        assert axis - len(shape) in short or n == tile * tiles, (axis, n, tiles)
        part = np.repeat(part, tile, axis=axis).take(range(n), axis=axis)
    return part


def in_codes(x: np.ndarray, q: QArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In units of a code: what was to be rounded, what was chosen, and the zero points.

    A scale that was rounded to 0 makes all of its tile 0, whatever the codes are; left out here.
    """
    scale = over_codes(q, scales(q))
    zero = np.zeros(x.shape) if q.zero_point is None else over_codes(q, np.asarray(q.zero_point))
    wanted = np.divide(x, scale, out=np.zeros(x.shape), where=scale != 0) + zero
    chosen = np.where(scale == 0, zero, values_of(q.codes, q.scheme.values))
    return wanted, chosen, zero.astype(np.float64)


def around(wanted: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray]:
    """The two values of a format next to what is wanted, or the last two at an end."""
    found = every_value(format)
    right = np.clip(np.searchsorted(found, wanted), 1, len(found) - 1)
    return found[right - 1], found[right]


def same_bits(a: object, b: object) -> bool:
    """Whether two arrays hold the same bytes (so that -0 is not 0, and NaN is NaN)."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
