"""NF4 and FP4 are, to the byte, what bitsandbytes makes of the same arrays. See README.md."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.checkpoint._bitsandbytes import (
    double_quantize,
    KINDS,
    write_bitsandbytes,
)
from jaxquant.numerics import DYNAMIC8
from jaxquant.qarray import dequantize, QArray, quantize_array, Scheme, Tile

HERE = pathlib.Path(__file__).parent
CASES = ("gauss", "heavy", "tiny", "huge", "zeros", "short", "ties")
DOUBLE = ("many", "zeros", "single")
# torch adds up in float32, in a tree; this is ample for 264 numbers of one sign.
SUM_ERROR = 16 * 2.0**-24


@pytest.fixture(scope="module")
def single() -> dict[str, np.ndarray]:
    return dict(np.load(HERE / "bitsandbytes.npz"))


@pytest.fixture(scope="module")
def double() -> dict[str, np.ndarray]:
    return dict(np.load(HERE / "bitsandbytes_double.npz"))


def _quantized(x: np.ndarray, kind: str, block: int) -> QArray:
    """Blocks are runs of the flattened array, so the array may as well be flat."""
    ragged = bool(x.size % block)
    scheme = Scheme(values=KINDS[kind], tile=Tile(contracted=block, ragged=ragged))
    return quantize_array(jnp.asarray(x.astype(np.float32).ravel()), scheme)


@pytest.mark.parametrize("format", [*KINDS.values(), DYNAMIC8], ids=str)
def test_each_code_stands_for_the_same_number(format, single):
    np.testing.assert_array_equal(
        np.asarray(format.table, np.float32), single[format.name.lower().rstrip("8")]
    )


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_the_same(case: str, kind: str, block: int, single):
    tensors = write_bitsandbytes(_quantized(single[case], kind, block))
    key = f"{case}.{kind}.{block}"
    packed, absmax = tensors["weight"].ravel(), tensors["weight.absmax"]
    np.testing.assert_array_equal(absmax, single[f"{key}.absmax"])
    np.testing.assert_array_equal(packed, single[f"{key}.packed"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["gauss", "short"])
def test_the_values_are_the_same(case: str, kind: str, single):
    wanted = single[f"{case}.{kind}.64.values"]
    got = np.asarray(dequantize(_quantized(single[case], kind, 64)))[-len(wanted) :]
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("kind, block", [("nf4", 64), ("fp4", 64), ("nf4", 128)])
@pytest.mark.parametrize("case", DOUBLE)
def test_double_quantization_gives_the_same_bytes(case: str, kind: str, block: int, double):
    key = f"{case}.{kind}.{block}"
    if f"{key}.absmax" not in double:
        pytest.skip("the array is smaller than the block")
    tensors = write_bitsandbytes(_quantized(double[case], kind, block), double=True)
    np.testing.assert_array_equal(tensors["weight.absmax"], double[f"{key}.absmax_codes"])
    if f"{key}.packed" in double:
        np.testing.assert_array_equal(tensors["weight"].ravel(), double[f"{key}.packed"])
    offset = double_quantize(double[f"{key}.absmax"])[2]
    np.testing.assert_allclose(offset, double[f"{key}.offset"], rtol=SUM_ERROR)
    # A difference from the mean has the mean's error.
    np.testing.assert_allclose(
        tensors["weight.nested_absmax"],
        double[f"{key}.nested_absmax"],
        rtol=2.0**-22,
        atol=SUM_ERROR * float(offset),
    )
