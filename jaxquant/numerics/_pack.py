"""Codes of less than a byte packed into bytes, exactly, for 1 to 7 bits.

A code of `b` bits is cut into parts of 4, 2 and 1 bits (5 = 4 + 1, 6 = 4 + 2, ...), the lowest
bits first. Parts of `w` bits share a byte, `8 / w` of them, along the last axis and far apart: byte
`j` of a block of `n` codes holds, lowest bits first, those of the codes `j`, `j + n w / 8`,
`j + 2 n w / 8` and so on. Unpacking is then a concatenation of contiguous runs, which vectorizes,
where interleaved neighbours would need a shuffle. A block's parts follow each other, `n b / 8`
bytes in all; `block` is its number of codes.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped, UInt8

from ._bytes import as_bytes, converted
from .formats import Format


def widths(format: Format) -> tuple[int, ...]:
    """Of how many bits the parts of a code are, from its lowest bits on."""
    return tuple(w for w in (4, 2, 1) if format.bits & w)


def packed_size(size: int, format: Format) -> int:
    """How many bytes hold `size` codes."""
    return size * format.bits // 8


def pack(
    codes: Shaped[Array, "*stack n"], format: Format, block: int
) -> UInt8[Array, "*stack bytes"]:
    """Codes of `format` packed along the last axis, in blocks of `block` codes.

    Everything is unsigned: shifts of signed 8-bit integers saturate on TPU.

    **Raises:** `ValueError` if `block` does not divide the last axis into whole bytes.
    """
    check_block(codes.shape[-1], format, block)
    bits = as_bytes(codes).astype(jnp.int8 if format.signed else jnp.uint8).astype(jnp.uint8)
    blocks = bits.reshape(*codes.shape[:-1], -1, block)
    parts = []
    shift = 0
    for width in widths(format):
        part = (blocks >> np.uint8(shift)) & np.uint8(2**width - 1)
        runs = part.reshape(*part.shape[:-1], 8 // width, block * width // 8)
        byte = runs[..., 0, :]
        for i in range(1, 8 // width):
            byte = byte | (runs[..., i, :] << np.uint8(i * width))
        parts.append(byte)
        shift += width
    return jnp.concatenate(parts, axis=-1).reshape(*codes.shape[:-1], -1)


def unpack(
    packed: UInt8[Array, "*stack bytes"],
    format: Format,
    block: int,
    dtype: DTypeLike | None = None,
) -> Shaped[Array, "*stack n"]:
    """Undoes `pack`. Codes of an integer format may be had as another integer `dtype`."""
    check_block(packed.shape[-1] * 8 // format.bits, format, block)
    blocks = packed.reshape(*packed.shape[:-1], -1, packed_size(block, format))
    codes = None
    start = shift = 0
    for width in widths(format):
        size = block * width // 8
        part = blocks[..., start : start + size]
        mask = np.uint8(2**width - 1)
        runs = [(part >> np.uint8(i * width)) & mask for i in range(8 // width)]
        bits = jnp.concatenate(runs, axis=-1) << np.uint8(shift)
        codes = bits if codes is None else codes | bits
        start, shift = start + size, shift + width
    assert codes is not None
    codes = codes.reshape(*packed.shape[:-1], -1)
    if format.signed:
        # Flipping the sign bit and subtracting its weight extends the sign to 8 bits.
        half = 2 ** (format.bits - 1)
        codes = (codes ^ np.uint8(half)).astype(jnp.int8) - np.int8(half)
    return converted(codes, np.dtype(dtype or format.storage))


def least_block(format: Format) -> int:
    """The smallest number of codes that fill whole bytes with each of their parts."""
    return 8 // min(widths(format))


def check_block(size: int, format: Format, block: int) -> None:
    """Refuses formats that do not pack, and blocks that do not fill an axis with whole bytes."""
    if not format.packs:
        raise ValueError(f"Codes of {format} fill whole bytes; there is nothing to pack.")
    least = least_block(format)
    if block < least or block % least or size % block:
        raise ValueError(
            f"An axis of {size} codes of {format} cannot be packed in blocks of {block}: blocks "
            f"are multiples of {least} and divide the axis. Leave it unpacked, or use such a "
            f"divisor of {size}."
        )
