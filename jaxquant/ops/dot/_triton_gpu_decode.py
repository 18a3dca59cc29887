"""Codes to bfloat16 in registers, four neighbouring bytes at a time, as PTX.

Triton converts bytes one by one; here two values share each 32-bit register all along. A byte is
moved to the low half of a 16-bit lane, and its code is or-ed into a bfloat16 that it completes:
`0x4300 | c` is `128 + c` for `c` of up to 7 bits, so that one subtraction gives the code, exactly.
Small floats are shifted to where bfloat16 has their fields, and multiplied by the power of two by
which the exponents' biases differ: exact for subnormal numbers too. Tables are looked up by `prmt`,
which picks bytes out of two registers.

Each text stands beside what it means in JAX, which interpret mode computes; tests/ops/dot executes
the texts on all bytes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, UInt8

from ...numerics import decode, E2M1, E4M3, Format
from ...numerics._pack import widths
from .._pallas import gpu_asm

# (a & b) ^ c and (a & b) | c and, bit by bit, a ? b : c.
_AND_XOR, _AND_OR, _PICK = "0x6a", "0xea", "0xca"


def runs(format: Format) -> int:
    """How many codes far apart share a byte: as many as the low parts of codes fill it."""
    return 8 // widths(format)[0] if format.packs else 1


def refuses_format(format: Format) -> str | None:
    """Why codes of `format` cannot be decoded here, or `None`."""
    if format.integer and format.bits in (2, 3, 4, 8):
        return None
    if format in (E2M1, E4M3) or (format.table is not None and format.bits == 4):
        return None
    return f"it has no decoder for {format}"


def terms_of(format: Format, wanted: int) -> int:
    """How many bfloat16 numbers add up to a value, at most `wanted`; 1 where that is exact."""
    exact = format.table is None or format.exact_in(np.dtype(ml_dtypes.bfloat16))
    return 1 if exact else wanted


def decoded(
    low: UInt8[Array, "n bytes"],
    high: UInt8[Array, "n bytes"] | None,
    format: Format,
    run: int,
    *,
    terms: int,
    interpret: bool,
) -> list[BFloat16[Array, "n bytes"]]:
    """What the codes of run `run` stand for, as `terms` bfloat16 numbers that add up to it.

    `high` holds the last bits of codes of 3 bits: that of this run lies at bit `2 run`.
    """
    texts = _texts(format, run, terms)
    args = (low,) if high is None else (low, high)
    return [
        gpu_asm(
            text,
            *args,
            dtype=jnp.bfloat16,
            pack=4,
            meaning=lambda *a, i=i: _meaning(a, format, run, i),
            interpret=interpret,
        )
        for i, text in enumerate(texts)
    ]


def minus(a: Array, b: Array, interpret: bool) -> Array:
    """`a - b` of bfloat16 arrays of one shape, two at a time."""
    return _pairs("sub.rn.bf16x2", lambda a, b: a - b, a, b, interpret)


def times(a: Array, b: Array, interpret: bool) -> Array:
    """`a * b` of bfloat16 arrays of one shape, two at a time."""
    return _pairs("mul.rn.bf16x2", lambda a, b: a * b, a, b, interpret)


def _pairs(op: str, meaning: Callable[..., Any], a: Array, b: Array, interpret: bool) -> Array:
    text = f"{op} $0, $1, $2;"
    return gpu_asm(text, a, b, dtype=jnp.bfloat16, pack=2, meaning=meaning, interpret=interpret)


def _meaning(args: tuple[Array, ...], format: Format, run: int, term: int) -> Array:
    low = args[0].astype(jnp.uint8)
    if format == E4M3:
        values = lax.bitcast_convert_type(low, format.storage).astype(jnp.bfloat16)
        infinite = jnp.where(low >= 128, -jnp.inf, jnp.inf).astype(jnp.bfloat16)
        return jnp.where(jnp.isnan(values), infinite, values)
    if not format.packs:
        return lax.bitcast_convert_type(low, format.storage).astype(jnp.bfloat16)
    width = widths(format)[0]
    code = low >> np.uint8(run * width) & np.uint8(2**width - 1)
    if len(args) == 2:
        code = code | (args[1] >> np.uint8(2 * run) & np.uint8(1)) << np.uint8(2)
    if format.integer:
        half = 2 ** (format.bits - 1) if format.signed else 0
        return ((code ^ np.uint8(half)).astype(jnp.int32) - half).astype(jnp.bfloat16)
    if format.table is None:
        return decode(
            lax.bitcast_convert_type(code.astype(jnp.uint4), format.storage), format, jnp.bfloat16
        )
    table = tuple(float(v) for v in _split(format)[term])
    return decode(code, dataclasses.replace(format, table=table), jnp.bfloat16)


def _split(format: Format) -> list[np.ndarray]:
    """A table of 16 as three tables of bfloat16 numbers that add up to it."""
    left = np.asarray(format.table, np.float32)
    tables = []
    for _ in range(3):
        tables.append(left.astype(ml_dtypes.bfloat16))
        left = left - tables[-1].astype(np.float32)
    return tables


def _texts(format: Format, run: int, terms: int) -> list[str]:
    if format.table is not None:
        return [_table_text(table, run) for table in _split(format)[:terms]]
    if format.integer:
        return [_integer_text(format, run)]
    return [_float_text(format, run)]


def _block(registers: str, lines: list[str]) -> str:
    return "\n".join(["{", f".reg .b32 {registers};", *lines, "}"])


# Bytes 0 and 1, and 2 and 3, each alone in the low half of a lane.
_LANES = (("a", "0x4140"), ("b", "0x4342"))


def _twice(value: int) -> str:
    return f"0x{value << 16 | value:08x}"


def _integer_text(format: Format, run: int) -> str:
    lines = []
    if not format.packs:
        flip = [] if format.signed else ["xor.b32 s, $2, 0x80808080;"]
        word = "$2" if format.signed else "s"
        lines += [*flip, "mov.b32 k, 0x43004300;"]
        for i, (lane, bytes_) in enumerate(_LANES):
            lines += [
                f"prmt.b32 {lane}, {word}, 0, {bytes_};",
                f"lop3.b32 c, {lane}, 0x007f007f, 0x43004300, {_AND_XOR};",
                # 128, or 256 where the sign is set: 0x4380.
                f"lop3.b32 {lane}, {lane}, 0x00800080, 0x43004300, {_AND_XOR};",
                f"sub.rn.bf16x2 ${i}, c, {lane};",
            ]
            if not format.signed:
                lines.append(f"add.rn.bf16x2 ${i}, ${i}, k;")
        return _block("a, b, c, k, s", lines)
    width = widths(format)[0]
    half = 2 ** (format.bits - 1) if format.signed else 0
    start = _twice(0x4300 | half)
    lines.append(f"mov.b32 k, {start};")
    for i, (lane, bytes_) in enumerate(_LANES):
        lines.append(f"prmt.b32 {lane}, $2, 0, {bytes_};")
        if run:
            lines.append(f"shr.u32 {lane}, {lane}, {run * width};")
        lines.append(f"lop3.b32 {lane}, {lane}, {_twice(2**width - 1)}, {start}, {_AND_XOR};")
        if format.bits == 3:
            lines.append(f"prmt.b32 c, $3, 0, {bytes_};")
            shift = 2 * run - 2
            if shift < 0:
                lines.append(f"shl.b32 c, c, {-shift};")
            elif shift:
                lines.append(f"shr.u32 c, c, {shift};")
            lines.append(f"lop3.b32 {lane}, c, {_twice(4)}, {lane}, {_AND_XOR};")
        lines.append(f"sub.rn.bf16x2 ${i}, {lane}, k;")
    return _block("a, b, c, k", lines)


def _float_text(format: Format, run: int) -> str:
    """Sign to bit 15, exponent and mantissa to end at the mantissa's place, times a power of 2."""
    assert format.mantissa is not None
    up = 7 - format.mantissa - 4 * run
    magnitude = 2 ** (format.bits - 1) - 1 << 7 - format.mantissa
    sign = 16 - format.bits - 4 * run
    # The biases differ by so much: 1 - bias is the least exponent of each.
    factor = 127 + format.least_exponent + 126
    lines = [f"mov.b32 k, {_twice(factor << 7)};"]
    for i, (lane, bytes_) in enumerate(_LANES):
        find_nan, not_a_number = [], []
        if format.bits == 8:
            # One more than the magnitude reaches the next bit where that is 0x7f, no number.
            find_nan = [f"and.b32 n, {lane}, 0x007f007f;", "add.u32 n, n, 0x00010001;"]
            # That bit, moved to the top of the exponent, makes the product overflow.
            not_a_number = [
                "shl.b32 n, n, 7;",
                f"lop3.b32 {lane}, n, 0x40004000, {lane}, {_AND_OR};",
            ]
        lines += [
            f"prmt.b32 {lane}, $2, 0, {bytes_};",
            *find_nan,
            f"shl.b32 c, {lane}, {sign};",
            "and.b32 c, c, 0x80008000;",
            f"shl.b32 {lane}, {lane}, {up};",
            f"lop3.b32 {lane}, {lane}, {_twice(magnitude)}, c, {_AND_OR};",
            *not_a_number,
            f"mul.rn.bf16x2 ${i}, {lane}, k;",
        ]
    return _block("a, b, c, k, n", lines)


def _table_text(table: np.ndarray, run: int) -> str:
    bits = table.view(np.uint16)
    low, high = ((bits >> s & 255).astype(np.uint8).view(np.uint32) for s in (0, 8))
    shift = ["shr.u32 n, $2, 4;"] if run else ["mov.b32 n, $2;"]
    lines = [
        *shift,
        "and.b32 n, n, 0x0f0f0f0f;",
        # Bytes of all ones where a code is 8 or more: `prmt` repeats signs.
        "shl.b32 m, n, 4;",
        "prmt.b32 m, m, 0, 0xba98;",
        # The codes, less their top bits, in the four low nibbles: what `prmt` selects by.
        "and.b32 n, n, 0x07070707;",
        "shr.u32 s, n, 4;",
        "or.b32 s, s, n;",
        "prmt.b32 s, s, 0, 0x4420;",
    ]
    for name, half in (("a", low), ("b", high)):
        words = [f"0x{int(w):08x}" for w in half]
        lines += [
            f"mov.b32 c, {words[0]};",
            f"prmt.b32 {name}, c, {words[1]}, s;",
            f"mov.b32 c, {words[2]};",
            f"prmt.b32 c, c, {words[3]}, s;",
            f"lop3.b32 {name}, m, c, {name}, {_PICK};",
        ]
    lines += ["prmt.b32 $0, a, b, 0x5140;", "prmt.b32 $1, a, b, 0x7362;"]
    return _block("a, b, c, m, n, s", lines)
