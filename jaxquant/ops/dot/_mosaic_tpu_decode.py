"""From a block of codes in a TPU core's memory to factors that its matrix unit multiplies.

A decoder reads `rows` neighbours along `k` at once and gives `[rows, columns]`, perhaps in another
order of rows and with a constant added: what is cheap differs between generations. The columns of
the activations are put in the same order, and what the constant adds to sums is taken off them.
Each decoder is a static value that says

- `offset`: what its factors are too large by; `factor`, what they are too small by;
- `pieces`: in which order rows come, that of `row_of`;
- `least_unit`, `least_columns`: what it decodes at a time is a multiple of so many rows, and of so
  many columns unless there are fewer;
- `columns(n)`: how many stored elements hold `n` columns;
- `decode(ref, start, rows, columns)`: so many rows from `start` on, in a dtype by which the matrix
  unit multiplies bfloat16.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ...numerics import Format
from ...numerics._pack import packed_size, widths
from .. import _pallas as pallas

# One bit pattern in both halves of a word.
_TWICE = 0x00010001


def row_of(position: Array, rows: int, pieces: int) -> Array:
    """Which of `rows` neighbours a decoder of so many pieces gives at a position.

    A word holds `2 pieces` neighbours. Piece by piece, each word gives the two that lie `pieces`
    apart.
    """
    if pieces == 1:
        return position
    piece, within = position // (rows // pieces), position % (rows // pieces)
    return within // 2 * (2 * pieces) + piece + within % 2 * pieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OneEach:
    """What decoders have in common: one code an element, in order, neither too large nor small."""

    offset: float = 0.0
    factor: float = 1.0
    pieces: int = 1
    least_unit: int = 32
    least_columns: int = 128

    def columns(self, columns: int) -> int:
        return columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast(_OneEach):
    """Codes in a dtype that the vector unit converts."""

    def decode(self, ref: Any, start: int, rows: int, columns: slice) -> Array:
        return ref[start : start + rows, columns].astype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bias11(_OneEach):
    """e4m3 as the e4m3 that matrix units of generations 5 and 6 have, of exponents biased by 11.

    The same bits stand for 1/16 there, but for -0, which is that format's NaN and is made 0.
    """

    factor: float = 16.0

    def decode(self, ref: Any, start: int, rows: int, columns: slice) -> Array:
        return as_bias_11(ref[start : start + rows, columns])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nibbles:
    """4-bit integers, eight to a word, as bfloat16 without converting one.

    A word of 32 bits holds the codes of 8 neighbouring rows. Shifted and masked, two of them, 4
    rows apart, lie at the top of the mantissas of two bfloat16, whose exponent makes them 16 + code
    (of signed codes, with the sign bit flipped, 24 + code).
    """

    signed: bool
    factor: float = 1.0
    pieces: int = 4
    # Four pieces of 16 rows, as many as a register of bfloat16 has.
    least_unit: int = 64
    least_columns: int = 128

    @property
    def offset(self) -> float:
        return 24.0 if self.signed else 16.0

    def columns(self, columns: int) -> int:
        return columns

    def decode(self, ref: Any, start: int, rows: int, columns: slice) -> Array:
        words = pallas.bitcast(ref[start : start + rows, columns], jnp.int32)
        if self.signed:
            words = words ^ _word(0x88888888)
        pieces = [_bfloat16s(_shifted(words, 4 * j - 3), 0xF << 3, 16) for j in range(4)]
        return jnp.concatenate(pieces, axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """Integers of 1 to 3 bits in blocks of `numerics.pack` along the columns, as bfloat16.

    A byte holds parts of codes that lie far apart in a block; a word, the bytes of 4 neighbouring
    rows. Two of these, 2 rows apart, become two bfloat16 as in `Nibbles`.
    """

    format: Format
    block: int
    factor: float = 1.0
    pieces: int = 2
    least_unit: int = 32

    @property
    def least_columns(self) -> int:
        return self.block

    @property
    def offset(self) -> float:
        return 2.0**self.format.bits + (2.0 ** (self.format.bits - 1) if self.format.signed else 0)

    def columns(self, columns: int) -> int:
        return packed_size(columns, self.format)

    def decode(self, ref: Any, start: int, rows: int, columns: slice) -> Array:
        stored = slice(self.columns(columns.start), self.columns(columns.stop))
        words = pallas.bitcast(ref[start : start + rows, stored], jnp.int32)
        block = self.columns(self.block)
        blocks = [self._block(words[:, at : at + block]) for at in range(0, words.shape[1], block)]
        return jnp.concatenate(blocks, axis=1)

    def _block(self, words: Array) -> Array:
        bits = self.format.bits
        halves = []
        for j in range(2):
            code, at, low = None, 0, 0
            for width in widths(self.format):
                size = self.block * width // 8
                run = words[:, at : at + size]
                # From where a part lies to where it belongs: the code's top at the mantissa's.
                place = 7 - bits + low
                parts = [
                    _shifted(run, 8 * j + i * width - place)
                    & _word((2**width - 1) * _TWICE << place)
                    for i in range(8 // width)
                ]
                found = jnp.concatenate(parts, axis=1)
                code = found if code is None else code | found
                at, low = at + size, low + width
            assert code is not None
            if self.format.signed:
                code = code ^ _word(_TWICE << 6)
            halves.append(_with_exponent(code, 2**bits))
        return jnp.concatenate(halves, axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup(_OneEach):
    """4-bit codes as indices into a table, which the lanes of a register hold.

    Two entries, rounded to bfloat16, are joined to a word, in the order of `Nibbles`.
    """

    table: tuple[float, ...]
    pieces: int = 4
    least_unit: int = 64

    def decode(self, ref: Any, start: int, rows: int, columns: slice) -> Array:
        words = pallas.bitcast(ref[start : start + rows, columns], jnp.int32)
        indices = [_shifted(words, 4 * i) & _word(0xF) for i in range(8)]
        low, high = self._words(0), self._words(16)
        pieces = [
            pallas.bitcast(
                _looked_up(low, indices[j]) | _looked_up(high, indices[j + 4]), jnp.bfloat16
            )
            for j in range(4)
        ]
        return jnp.concatenate(pieces, axis=0)

    def _words(self, shift: int) -> tuple[int, ...]:
        """The table's entries as bfloat16 in one half of a word."""
        bits = np.asarray(self.table, jnp.bfloat16).view(np.uint16).astype(np.uint32)
        return tuple(int(b) for b in (bits << np.uint32(shift)).view(np.int32))


Decoder = Cast | Bias11 | Nibbles | Packed | Lookup


def _looked_up(table: tuple[int, ...], indices: Array) -> Array:
    """Entries of a table of 16 words: a gather within the lanes of a register."""
    lanes = lax.broadcasted_iota(jnp.int32, (8, 128), 1)
    held = functools.reduce(
        lambda found, at: jnp.where(lanes == at[0], jnp.int32(at[1]), found),
        enumerate(table),
        jnp.zeros((8, 128), jnp.int32),
    )
    rows, columns = indices.shape
    tall = jnp.concatenate([held] * math.ceil(rows / 8), axis=0)[:rows]
    runs = [
        jnp.take_along_axis(
            tall[:, : min(128, columns - at)],
            indices[:, at : at + 128],
            axis=1,
            mode="promise_in_bounds",
        )
        for at in range(0, columns, 128)
    ]
    return jnp.concatenate(runs, axis=1)


def as_bias_11(codes: Array) -> Array:
    """The bits of e4m3 as those of the format of `Bias11`, with -0 made 0."""
    words = pallas.bitcast(codes, jnp.int32)
    low = _word(0x7F7F7F7F)
    # The sign stays where another bit of the byte is set: these carry into its place.
    return pallas.bitcast(words & (((words & low) + low) | low), jnp.float8_e4m3b11fnuz)


def _word(bits: int) -> Any:
    """A word as int32, whose shifts and masks the vector unit has."""
    return np.uint32(bits).astype(np.int32)


def _shifted(words: Array, right: int) -> Array:
    """`words >> right`, filled up with zeros; to the left where `right` is negative."""
    if right == 0:
        return words
    if right < 0:
        return lax.shift_left(words, np.int32(-right))
    return lax.shift_right_logical(words, np.int32(right))


def _bfloat16s(words: Array, mask: int, exponent: int) -> Array:
    return _with_exponent(words & _word(mask * _TWICE), exponent)


def _with_exponent(words: Array, least: int) -> Array:
    """Mantissas in both halves of a word as bfloat16 from `least`, a power of two, on."""
    exponent = int(np.asarray(least, jnp.bfloat16).view(np.uint16))
    return pallas.bitcast(words | _word(exponent * _TWICE), jnp.bfloat16)
