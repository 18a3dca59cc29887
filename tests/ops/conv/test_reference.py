import jax.numpy as jnp
import numpy as np
import pytest
from convolutions import bound, CASES, convolution, exact, operands
from quantized import normal, SCHEMES

from jaxquant.ops.conv._api import make_call
from jaxquant.ops.conv._reference import refuses, run
from jaxquant.qarray import quantize_array


def _call(case, sides, **keywords):
    settings = dict(case.settings)
    return make_call(*sides, settings.pop("dimension_numbers"), settings, **keywords)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_convolution_of_what_the_codes_stand_for(name: str):
    case = CASES[name]
    sides = operands(case, None, "int8 zero channel")
    call = _call(case, sides)
    assert refuses(call) is None
    moved = np.abs(run(call) - convolution(case, *map(exact, sides)))
    assert (moved <= bound(case, *sides)).all()


def test_half_precision_operands_are_summed_in_float32():
    """4096 ones: in bfloat16 the sum would stand still at 256."""
    x = jnp.ones((1, 64, 64, 1), jnp.bfloat16)
    q = quantize_array(jnp.ones((64, 64, 1, 1)), SCHEMES["int8 channel"], contracted=(0, 1, 2))
    settings = dict(window_strides=(1, 1), padding="VALID")
    call = make_call(x, q, ("NHWC", "HWIO", "NHWC"), settings, out_dtype=jnp.float32)
    np.testing.assert_allclose(run(call), [[[[4096.0]]]], rtol=1e-6)


def test_it_takes_what_no_other_backend_does():
    case = CASES["2-D"]
    x = quantize_array(normal(*case.shapes[0]), SCHEMES["e4m3 channel"], contracted=case.summed(0))
    sides = [x, operands(case, None, "int8 zero channel")[1]]
    assert refuses(_call(case, sides)) is None
    moved = np.abs(run(_call(case, sides)) - convolution(case, *map(exact, sides)))
    assert (moved <= bound(case, *sides)).all()
