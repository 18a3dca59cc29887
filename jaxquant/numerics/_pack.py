"""Sub-byte codes and bytes, exactly reversible.

Two 4-bit codes share a byte along the last axis, halves apart: byte `j` of a block of `2 h` codes
holds code `j` in its low nibble and code `j + h` in its high nibble. Unpacking is then one
concatenation of two contiguous halves, which vectorizes, where interleaved neighbours would need
a shuffle. `block` is how many codes one such pair of halves spans.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped, UInt8


def pack(codes: Shaped[Array, "*stack n"], block: int) -> UInt8[Array, "*stack half"]:
    """Two signed 4-bit codes a byte along the last axis, in blocks of `block` codes.

    Everything is unsigned: shifts of signed 8-bit integers saturate on TPU.

    **Raises:** `ValueError` if `block` is odd or does not divide the last axis.
    """
    check_block(codes.shape[-1], block)
    nibbles = codes.astype(jnp.int8).astype(jnp.uint8) & np.uint8(15)
    halves = nibbles.reshape(*codes.shape[:-1], -1, 2, block // 2)
    low, high = halves[..., 0, :], halves[..., 1, :]
    return (low | (high << np.uint8(4))).reshape(*codes.shape[:-1], -1)


def unpack(
    packed: UInt8[Array, "*stack half"], block: int, dtype: DTypeLike | None = None
) -> Shaped[Array, "*stack n"]:
    """Undoes `pack`: signed codes, as `dtype` (by default `int4`)."""
    check_block(2 * packed.shape[-1], block)
    halves = packed.reshape(*packed.shape[:-1], -1, 1, block // 2)
    nibbles = jnp.concatenate([halves & np.uint8(15), halves >> np.uint8(4)], axis=-2)
    # Flipping the sign bit and subtracting its weight extends a 4-bit sign to 8 bits.
    signed = (nibbles ^ np.uint8(8)).astype(jnp.int8) - np.int8(8)
    codes = signed.reshape(*packed.shape[:-1], -1)
    return codes.astype(dtype or ml_dtypes.int4)


def check_block(size: int, block: int) -> None:
    """Refuses blocks that do not fill an axis of `size` codes with pairs of halves."""
    if block < 2 or block % 2 or size % block:
        raise ValueError(
            f"An axis of {size} codes cannot be packed in blocks of {block}: blocks are even and "
            f"divide the axis. Leave it unpacked, or use an even divisor of {size}."
        )
