import ml_dtypes
import numpy as np
import pytest
from code_values import code_values, every_value

from jaxquant.numerics import (
    BFLOAT16,
    BINARY,
    E2M1,
    E3M2,
    E4M3,
    E5M2,
    FLOAT16,
    FLOAT32,
    format_named,
    FORMATS,
    FP4,
    INT4,
    INT8,
    NF4,
)

# name: bits, lowest, highest, smallest positive value; from the standards, by hand.
BY_HAND = {
    "INT1": (1, -1, 0, None),
    "INT2": (2, -2, 1, 1),
    "INT3": (3, -4, 3, 1),
    "INT4": (4, -8, 7, 1),
    "INT5": (5, -16, 15, 1),
    "INT6": (6, -32, 31, 1),
    "INT7": (7, -64, 63, 1),
    "INT8": (8, -128, 127, 1),
    "UINT1": (1, 0, 1, 1),
    "UINT2": (2, 0, 3, 1),
    "UINT3": (3, 0, 7, 1),
    "UINT4": (4, 0, 15, 1),
    "UINT5": (5, 0, 31, 1),
    "UINT6": (6, 0, 63, 1),
    "UINT7": (7, 0, 127, 1),
    "UINT8": (8, 0, 255, 1),
    "E4M3": (8, -448, 448, 2.0**-9),
    "E5M2": (8, -57344, 57344, 2.0**-16),
    "E3M2": (6, -28, 28, 0.0625),
    "E2M3": (6, -7.5, 7.5, 0.125),
    "E2M1": (4, -6, 6, 0.5),
    # The least of the standard, 2^-127, is below what XLA computes with.
    "E8M0": (8, 2.0**-126, 2.0**126, 2.0**-126),
    "NF4": (4, -1, 1, 0.07958029955625534),
    "FP4": (4, -1, 1, float(np.float32(1 / 192))),
    # The middle of the highest 64th of the decade up to 1, and that of the lowest decade.
    "DYNAMIC8": (8, -float(np.float32(0.99296875)), 1, float(np.float32(0.55) * np.float32(1e-6))),
    "TERNARY": (2, -1, 1, 1),
    "BINARY": (1, -1, 1, 1),
    "FLOAT16": (16, -65504, 65504, 2.0**-24),
    "BFLOAT16": (16, -(2.0**128 - 2.0**120), 2.0**128 - 2.0**120, 2.0**-133),
    "FLOAT32": (32, -(2.0**128 - 2.0**104), 2.0**128 - 2.0**104, 2.0**-149),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_what_its_standard_says(name: str):
    format = FORMATS[name]
    bits, lowest, highest, smallest = BY_HAND[name]
    assert (format.name, format.bits) == (name, bits)
    assert (format.lowest, format.highest) == (lowest, highest)
    assert format.storage.itemsize * 8 >= bits
    assert format.source
    whole = name.startswith(("INT", "UINT", "TERNARY"))
    assert format.integer == whole and (format.table is None or not whole)
    if bits > 8:
        assert float(ml_dtypes.finfo(format.storage).smallest_subnormal) == smallest
        return
    values = every_value(format)
    if name == "E8M0":
        values = values[(values >= lowest) & (values <= highest)]
    assert (values.min(), values.max()) == (lowest, highest)
    assert smallest is None or values[values > 0].min() == smallest
    assert format.has_zero == (0 in values or name == "E8M0")
    if format.table is not None:
        np.testing.assert_array_equal(np.asarray(format.table), code_values(format))


@pytest.mark.parametrize("name", FORMATS)
def test_only_formats_below_a_byte_pack(name: str):
    assert FORMATS[name].packs == (BY_HAND[name][0] < 8)


@pytest.mark.parametrize("name", FORMATS)
def test_only_integers_below_0_extend_a_sign(name: str):
    assert FORMATS[name].signed == (name.startswith("INT") or name == "TERNARY")


def test_only_shared_exponents_are_nothing_but_powers_of_two():
    assert [name for name, f in FORMATS.items() if f.power_of_two] == ["E8M0"]


def test_only_binary_cannot_hold_0():
    assert [name for name, f in FORMATS.items() if not f.has_zero] == ["BINARY"]


WIDE = {"float16": FLOAT16, "bfloat16": BFLOAT16, "float32": FLOAT32}


@pytest.mark.parametrize("dtype", [*WIDE, "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", [n for n in BY_HAND if BY_HAND[n][0] <= 8 and n != "E8M0"])
def test_whether_a_dtype_holds_every_value_is_so(name: str, dtype: str):
    held = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = every_value(FORMATS[name])
    assert FORMATS[name].exact_in(held) == (values.astype(held).astype(np.float64) == values).all()


def test_floats_of_16_bits_do_not_hold_each_other():
    assert not FLOAT16.exact_in(BFLOAT16.storage) and not BFLOAT16.exact_in(FLOAT16.storage)
    assert all(f.exact_in(FLOAT32.storage) for f in (FLOAT16, BFLOAT16, FLOAT32))


def test_the_hardware_rounds_to_floats_that_have_a_dtype():
    assert all(f.native for f in (E4M3, E5M2, E2M1, FLOAT16))
    assert not any(f.native for f in (E3M2, NF4, FP4, BINARY, INT4, INT8))


def test_names_are_found_in_any_case():
    assert format_named("int4") is INT4 and repr(INT4) == "INT4"
    assert all(format_named(name.lower()) is format for name, format in FORMATS.items())


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no format named 'int9'.*INT7, INT8, UINT1.*E4M3, E5M2"):
        format_named("int9")
