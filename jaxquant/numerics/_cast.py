"""Codes from reals and back: to the nearest, ties to even, or at random; never past the ends."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from ._bytes import as_bytes
from .formats import Format

# Up to so many entries a table is a tree of selects, which vectorizes; longer ones are looked up.
_LONGEST_TREE = 16


def encode(x: Float[Array, "*dims"], format: Format, key: Any = None) -> Shaped[Array, "*dims"]:
    """The codes of `format` nearest to `x`; values past an end go to that end.

    Ties go to the even number, in tables to the lower value. With a `key` (of `jax.random`)
    rounding is stochastic: up with the probability that makes the expectation `x`, to within 2^-23
    of a gap.

    NaN has no integer code and no place in a weight: callers check for it where data comes in
    (`jaxquant.quantize` names the leaf). Here NaN stays NaN in a format that has one, and becomes
    0, or what is nearest to it, in others.
    """
    x = jnp.clip(x.astype(jnp.float32), format.lowest, format.highest)
    if key is not None:
        # What comes out is a value of the format, which the rounding below leaves alone.
        x = _stochastic(x, format, key)
    if format.table is not None:
        return _to_table(jnp.where(jnp.isnan(x), 0.0, x), format).astype(format.storage)
    if format.integer:
        # XLA leaves the conversion of NaN to an integer undefined.
        return jnp.where(jnp.isnan(x), 0.0, jnp.round(x)).astype(format.storage)
    if format.storage.kind == "u":
        return _to_bits(jnp.where(jnp.isnan(x), 0.0, x), format).astype(format.storage)
    if format.bits == 4:
        # E2M1 has no NaN, and a cast of one means nothing.
        x = jnp.where(jnp.isnan(x), 0.0, x)
    # Casts to an 8-bit float overflow to NaN (e4m3) or infinity (e5m2): hence the clip above.
    return x.astype(format.storage)


def nearest_in_bytes(
    x: Float[Array, "*dims"], format: Format
) -> tuple[Float[Array, "*dims"], Shaped[Array, "*dims"]]:
    """The values nearest to `x` in float32, and their codes, a byte each as `as_bytes` has them.

    As `encode` and `decode`, but no 4-bit float comes in between: of these, XLA's CPU compiler
    makes invalid code in some loops (jaxlib 0.12).
    """
    if format.bits == 4 and format.table is None and not format.integer:
        within = jnp.clip(x.astype(jnp.float32), format.lowest, format.highest)
        bits = _to_bits(jnp.where(jnp.isnan(x), 0.0, within), format).astype(jnp.uint8)
        return _from_bits(bits, format), bits
    codes = encode(x, format)
    return decode(codes, format, jnp.float32), as_bytes(codes)


def decode(
    codes: Shaped[Array, "*dims"], format: Format, dtype: DTypeLike
) -> Float[Array, "*dims"]:
    """The values that `codes` stand for, before any scale. Exact whenever `dtype` can hold them.

    Codes may lie in a wider integer than the format's own.
    """
    if format.table is not None:
        return _from_table(codes, format.table).astype(dtype)
    if not format.integer and format.storage.kind == "u":
        return _from_bits(codes, format).astype(dtype)
    return codes.astype(dtype)


def round_at_random(x: Float[Array, "*dims"], key: Any) -> Float[Array, "*dims"]:
    """One of the two integers around `x`, such that the expectation is `x`."""
    below = jnp.floor(x)
    up = jax.random.uniform(key, x.shape, jnp.float32) < x - below
    return below + up.astype(x.dtype)


def _stochastic(x: Float[Array, "*dims"], format: Format, key: Any) -> Float[Array, "*dims"]:
    """One of the two values around `x`, at random."""
    if format.integer:
        return round_at_random(x, key)
    if format.table is not None:
        chance = jax.random.uniform(key, x.shape, jnp.float32)
        values, _, _ = _sorted_table(format.table)
        upper = jnp.clip(jnp.searchsorted(values, x, side="left"), 1, len(values) - 1)
        low, high = jnp.asarray(values)[upper - 1], jnp.asarray(values)[upper]
        chosen = jnp.where(chance * (high - low) < x - low, high, low)
        return jnp.where(jnp.isnan(x), x, chosen)
    if format.mantissa is None or format.mantissa >= 23:
        raise ValueError(f"{format} is not rounded to at random: it holds scales, or float32.")
    step, inverse = _gap(x, format.mantissa, format.least_exponent)
    return round_at_random(x * inverse, key) * step


def _gap(
    x: Float[Array, "*dims"], mantissa: int, least: int
) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"]]:
    """The gap between neighbours of a float around `x`, and its reciprocal: powers of two.

    So that products with them are exact.
    """
    exponent = (lax.bitcast_convert_type(x, jnp.int32) >> 23 & 255) - 127
    exponent = jnp.maximum(exponent, least) - mantissa
    exponent = jnp.maximum(exponent, -126)
    step = lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
    return step, lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32)


def _to_bits(x: Float[Array, "*dims"], format: Format) -> Shaped[Array, "*dims"]:
    """Sign, exponent and mantissa of a small float that has no dtype in JAX, in a byte."""
    assert format.mantissa is not None
    m, least = format.mantissa, format.least_exponent
    magnitude = jnp.abs(x)
    step, inverse = _gap(magnitude, m, least)
    rounded = lax.bitcast_convert_type(jnp.round(magnitude * inverse) * step, jnp.int32)
    # Biased exponent 0 is for numbers below the least normal one; it has that one's step.
    normal = (rounded >> (23 - m)) - ((least - 1 + 127) << m)
    small = jnp.round(magnitude * np.float32(2.0 ** (m - least))).astype(jnp.int32)
    code = jnp.where(small < 1 << m, small, normal)
    # The sign of -0 is kept, as in casts of the hardware.
    sign = (lax.bitcast_convert_type(x, jnp.int32) < 0).astype(jnp.int32) << (format.bits - 1)
    return code | sign


def _from_bits(codes: Shaped[Array, "*dims"], format: Format) -> Float[Array, "*dims"]:
    assert format.mantissa is not None
    m, least = format.mantissa, format.least_exponent
    bits = codes.astype(jnp.int32)
    code = bits & ((1 << (format.bits - 1)) - 1)
    normal = lax.bitcast_convert_type((code + ((least - 1 + 127) << m)) << (23 - m), jnp.float32)
    small = code.astype(jnp.float32) * np.float32(2.0 ** (least - m))
    value = jnp.where(code < 1 << m, small, normal)
    return jnp.where(bits >> (format.bits - 1) & 1 == 1, -value, value)


def _sorted_table(
    table: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values in ascending order, the code of each, and the middles between neighbours.

    A tie goes to the lower value. Of two codes for one value (FP4 has two zeros) the first takes
    what rounds to it from below, the second the rest: the bytes of bitsandbytes on a CPU.
    """
    values = np.asarray(table, np.float32)
    codes = np.argsort(values, kind="stable")
    values = values[codes]
    return values, codes, (values[:-1] + values[1:]) / np.float32(2)


def _to_table(x: Float[Array, "*dims"], format: Format) -> Shaped[Array, "*dims"]:
    assert format.table is not None
    _, codes, middles = _sorted_table(format.table)
    if len(middles) < _LONGEST_TREE:
        place = jnp.zeros(x.shape, jnp.int32)
        for middle in middles:
            place = place + (x > middle).astype(jnp.int32)
    else:
        place = jnp.searchsorted(middles, x, side="left")
    if (codes == np.arange(len(codes))).all():
        return place
    return _from_table(place, tuple(int(c) for c in codes))


def _from_table(codes: Shaped[Array, "*dims"], table: tuple[Any, ...]) -> Shaped[Array, "*dims"]:
    """`table[codes]`, as selects by each bit of the code where the table is short."""
    dtype = jnp.int32 if isinstance(table[0], int) else jnp.float32
    if len(table) > _LONGEST_TREE:
        return jnp.asarray(table, dtype)[codes.astype(jnp.int32)]
    index = codes.astype(jnp.uint8)
    # A code that no value has stands for the last one.
    level: list[Any] = [jnp.asarray(v, dtype) for v in table]
    bit = 0
    while len(level) > 1:
        level += [level[-1]] * (len(level) % 2)
        is_set = (index >> np.uint8(bit)) & np.uint8(1) == 1
        level = [jnp.where(is_set, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
        bit += 1
    return level[0]
