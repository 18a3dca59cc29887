"""Named schemes: what they cost and are, as published. The laws are in tests/laws/."""

import numpy as np
import pytest
from quantized import codes_of, scales

from jaxquant.numerics import ExponentRule
from jaxquant.qarray import Scheme, schemes

# Bits a value of a large array, as published: codes and the scales of a block.
BITS = {
    "int8_channel": 8,
    "int4_g64": 4.5,
    "e4m3_block": 8,
    "mxfp8_e4m3": 8.25,
    "mxfp8_e5m2": 8.25,
    "mxfp6_e3m2": 6.25,
    "mxfp6_e2m3": 6.25,
    "mxfp4": 4.25,
    "nvfp4": 4.5,
    "nf4": 4.5,
    # QLoRA, section 3: 4.127 with a float32 for 256 scales; here for 32 channels of 16 blocks.
    "nf4_double": 4.125,
    "fp4": 4.5,
    "ternary": 2,
    "binary": 1,
}


@pytest.mark.parametrize("name", schemes.NAMED)
def test_a_named_scheme_costs_what_is_published(name: str):
    assert codes_of(schemes.NAMED[name], 2**13, 256).bits_per_value == pytest.approx(
        BITS[name], abs=0.005
    )


def test_every_scheme_of_the_file_has_its_name():
    found = {name.lower(): s for name, s in vars(schemes).items() if isinstance(s, Scheme)}
    assert found == schemes.NAMED


@pytest.mark.parametrize("name", [name for name in schemes.NAMED if name.startswith("mx")])
def test_mx_scales_are_powers_of_two_by_the_rule_of_the_standard(name: str):
    scheme = schemes.NAMED[name]
    assert scheme.tile.contracted == 32 and scheme.range.rule is ExponentRule.FLOOR
    found = scales(codes_of(scheme, 64, 16))
    np.testing.assert_array_equal(found, np.exp2(np.rint(np.log2(found))))
