import ml_dtypes
import numpy as np
import pytest

from jaxquant.numerics import format_named, FORMATS, INT4

# name: bits, lowest, highest, smallest positive value; from the standards, by hand.
BY_HAND = {
    "INT8": (8, -128, 127, 1),
    "INT4": (4, -8, 7, 1),
    "E4M3": (8, -448, 448, 2.0**-9),
    "E5M2": (8, -57344, 57344, 2.0**-16),
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
    assert format.integer == (smallest == 1)
    if not format.integer:
        assert float(ml_dtypes.finfo(format.storage).smallest_subnormal) == smallest
    assert np.asarray([lowest, highest]).astype(format.storage).astype(float).tolist() == [
        lowest,
        highest,
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_only_formats_below_a_byte_pack(name: str):
    assert FORMATS[name].packs == (BY_HAND[name][0] < 8)


def test_names_are_found_in_any_case():
    assert format_named("int4") is INT4 and repr(INT4) == "INT4"


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no format named 'int5'.*INT8, INT4, E4M3, E5M2"):
        format_named("int5")
