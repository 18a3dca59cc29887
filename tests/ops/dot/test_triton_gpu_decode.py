"""The PTX texts say what they are said to mean: each is executed here, on all bytes."""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from code_values import code_values

from jaxquant.numerics import (
    BINARY,
    E2M1,
    E4M3,
    E5M2,
    FP4,
    INT2,
    INT3,
    INT4,
    INT5,
    INT8,
    NF4,
    TERNARY,
    UINT4,
    UINT8,
)
from jaxquant.ops.dot import _triton_gpu_decode as decode

FORMATS = [INT8, UINT8, INT4, UINT4, INT3, INT2, TERNARY, E2M1, E4M3, NF4, FP4]


def _pairs(word: np.ndarray) -> np.ndarray:
    return word.view(np.uint16).reshape(-1, 2).view(ml_dtypes.bfloat16).astype(np.float32)


def _words(pairs: np.ndarray) -> np.ndarray:
    return pairs.astype(ml_dtypes.bfloat16).view(np.uint16).view(np.uint32).ravel()


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """PTX ISA 8.8, section 9.7.9.7, the default mode."""
    eight = np.stack([a, b], -1).astype("<u4").view(np.uint8).reshape(-1, 8)
    out = np.zeros((len(a), 4), np.uint8)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = np.take_along_axis(eight, (nibble & 7).astype(np.int64)[:, None], 1)[:, 0]
        out[:, i] = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
    return out.view("<u4").ravel()


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    out = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            bits = [v if i >> s & 1 else ~v for v, s in ((a, 2), (b, 1), (c, 0))]
            out |= bits[0] & bits[1] & bits[2]
    return out


OPS = {
    "mov.b32": lambda a: a,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: a + b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "sub.rn.bf16x2": lambda a, b: _words(_pairs(a) - _pairs(b)),
    "add.rn.bf16x2": lambda a, b: _words(_pairs(a) + _pairs(b)),
    "mul.rn.bf16x2": lambda a, b: _words(_pairs(a) * _pairs(b)),
}


def _execute(text: str, args: list[np.ndarray]) -> np.ndarray:
    """The bfloat16 values that a text makes of bytes, four at a time."""
    held = {f"${2 + i}": a.view("<u4") for i, a in enumerate(args)}
    size = len(held["$2"])
    for line in re.findall(r"[^;{}]+;", text):
        op, *names = re.split(r"[\s,]+", line.strip().rstrip(";"))
        if op == ".reg":
            continue
        sources = [held[n] if n in held else np.full(size, int(n, 0), np.uint32) for n in names[1:]]
        with np.errstate(over="ignore"):
            held[names[0]] = OPS[op](*sources).astype(np.uint32)
    return np.stack([_pairs(held["$0"]), _pairs(held["$1"])], 1).reshape(-1)


def _bytes(format) -> list[np.ndarray]:
    """Every byte at each of the four places of a register; with codes of 3 bits every other one."""
    low = np.concatenate([np.roll(np.arange(256, dtype=np.uint8), i) for i in range(4)])
    if format.bits != 3:
        return [low]
    high = np.repeat(np.arange(256, dtype=np.uint8), 256)
    return [np.tile(low[:256], 256), high]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_texts_mean_what_is_said(format):
    args = _bytes(format)
    for run in range(decode.runs(format)):
        for term, text in enumerate(decode._texts(format, run, 3)):
            meant = decode._meaning(tuple(jnp.asarray(a) for a in args), format, run, term)
            np.testing.assert_array_equal(
                _execute(text, args), np.asarray(meant).astype(np.float32)
            )


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_terms_add_up_to_the_value_of_the_code(format):
    args = _bytes(format)
    width = 2 if format.bits == 3 else format.bits
    for run in range(decode.runs(format)):
        codes = args[0] >> (width * run) & (2**width - 1)
        if len(args) > 1:
            codes = codes | (args[1] >> (2 * run) & 1) << 2
        expected = code_values(format)[codes]
        terms = decode.decoded(
            *(jnp.asarray(a)[None] for a in args),
            *([None] if len(args) == 1 else []),
            format,
            run,
            terms=decode.terms_of(format, 3),
            interpret=True,
        )
        total = sum(np.asarray(v).astype(np.float64).ravel() for v in terms)
        number = np.isfinite(expected)
        # Three numbers of 8 bits hold the 24 of a float32.
        exact = 0 if len(terms) == 1 else 2.0**-24
        assert (np.abs(total - expected)[number] <= exact * np.abs(expected[number])).all()
        if format == E4M3:
            assert np.isinf(total[~number]).all()


def test_pairs_are_computed_two_at_a_time():
    a, b = (jnp.asarray([3.0, -1.5, 0.25, 7.0], jnp.bfloat16) * s for s in (1, 3))
    assert (np.asarray(decode.minus(a, b, True)) == np.asarray(a - b)).all()
    assert (np.asarray(decode.times(a, b, True)) == np.asarray(a * b)).all()


def test_a_table_that_bfloat16_does_not_hold_takes_three_numbers():
    assert decode.terms_of(NF4, 3) == 3
    assert decode.terms_of(NF4, 1) == 1
    assert decode.terms_of(INT4, 3) == decode.terms_of(E4M3, 3) == 1


def test_what_has_no_decoder_is_refused():
    for format in (E5M2, INT5, BINARY):
        assert f"no decoder for {format}" in str(decode.refuses_format(format))
    for format in FORMATS:
        assert decode.refuses_format(format) is None
