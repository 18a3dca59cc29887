import jax.numpy as jnp
import numpy as np
import pytest
from products import bound, CASES, operands, product
from quantized import normal, SCHEMES

from jaxquant.ops.dot._api import make_call
from jaxquant.ops.dot._reference import refuses, run
from jaxquant.qarray import quantize_array


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_product_of_what_the_codes_stand_for(name: str):
    case = CASES[name]
    lhs, rhs = operands(case, None, "int4 zero g64")
    call = make_call(lhs, rhs, case.numbers)
    assert refuses(call) is None
    moved = np.abs(np.asarray(run(call)) - product(case, lhs, rhs))
    assert (moved <= bound(case, lhs, rhs, halves=False)).all()


def test_half_precision_operands_are_summed_in_float32():
    """4096 ones and a 2^-8 each: in bfloat16 the sum would stand still at 256."""
    x = jnp.ones((1, 4096), jnp.bfloat16)
    q = quantize_array(jnp.ones((4096, 1)), SCHEMES["int8 channel"], contracted=(0,))
    call = make_call(x, q, (((1,), (0,)), ((), ())), out_dtype=jnp.float32)
    np.testing.assert_allclose(run(call), [[4096.0]], rtol=1e-6)


def test_it_takes_what_no_other_backend_does():
    x = quantize_array(normal(4, 64), SCHEMES["e4m3 channel"])
    w = quantize_array(normal(64, 8), SCHEMES["int8 zero channel"], contracted=(0,))
    assert refuses(make_call(x, w, (((1,), (0,)), ((), ())))) is None
