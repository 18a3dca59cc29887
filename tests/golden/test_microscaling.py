"""MX formats and NVFP4 against torchao and ggml, and where they differ from us. See README.md."""

import dataclasses
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant.numerics import (
    decode,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    encode,
    ExponentRule,
    Format,
    SharedExponent,
)
from jaxquant.qarray import dequantize, QArray, quantize_array, schemes

HERE = pathlib.Path(__file__).parent
MX = {
    "e4m3": (schemes.MXFP8_E4M3, ml_dtypes.float8_e4m3fn),
    "e5m2": (schemes.MXFP8_E5M2, ml_dtypes.float8_e5m2),
    "e3m2": (schemes.MXFP6_E3M2, ml_dtypes.float6_e3m2fn),
    "e2m3": (schemes.MXFP6_E2M3, ml_dtypes.float6_e2m3fn),
    "e2m1": (schemes.MXFP4, ml_dtypes.float4_e2m1fn),
}
RULES = {
    "floor": ExponentRule.FLOOR,
    "rceil": ExponentRule.CEIL,
    "even": ExponentRule.EVEN,
}
# Tiles of these need scales below 2^-126, where all three differ from the specification.
BELOW = ("least", "subnormal")
LEAST_SCALE = 2.0**-126
# Cases with blocks whose scale is below 2^-6, the scale of the tensor being 1 / 448.
WIDE = ("wide", "zeros", "ties_e5m2")


@pytest.fixture(scope="module")
def mx() -> dict[str, np.ndarray]:
    return dict(np.load(HERE / "microscaling.npz"))


@pytest.fixture(scope="module")
def nv() -> dict[str, np.ndarray]:
    return dict(np.load(HERE / "nvfp4.npz"))


def _mx(x: np.ndarray, name: str, rule: str) -> QArray:
    scheme = dataclasses.replace(MX[name][0], range=SharedExponent(rule=RULES[rule]))
    return quantize_array(jnp.asarray(x), scheme)


def _values(q: QArray) -> np.ndarray:
    return np.asarray(dequantize(q)).astype(np.float64)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MX)
def test_mx_scales_and_values_are_those_of_torchao(name: str, rule: str, mx):
    rows = ~np.isin(mx["case_of"], BELOW)
    q = _mx(mx["x"][rows], name, rule)
    scale = mx[f"{name}.{rule}.scale"][rows]
    values = mx[f"{name}.{rule}.codes"][rows].view(MX[name][1]).astype(np.float64)
    wanted = np.ldexp(values, np.repeat(scale.astype(int) - 127, 32, axis=-1))
    with np.errstate(over="ignore"):  # 3e38 rounds up to 2^128, which no float32 holds
        wanted = wanted.astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(_values(q), wanted)
    # The scale of a tile of zeros is ours to choose.
    some = np.abs(mx["x"][rows]).reshape(*scale.shape, 32).max(-1) > 0
    np.testing.assert_array_equal(np.asarray(q.scale).view(np.uint8)[some], scale[some])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MX)
def test_mx_tiles_below_the_least_scale_round_to_its_steps(name: str, rule: str, mx):
    x = mx["x"][np.isin(mx["case_of"], BELOW)]
    format = MX[name][0].values
    gap = LEAST_SCALE * 2.0 ** (format.least_exponent - format.mantissa)
    # Past its subnormal numbers a format rounds by half an ulp; and XLA flushes below 2^-126.
    allowed = np.maximum(gap / 2, np.abs(x) * 2.0 ** (-1 - format.mantissa)) + LEAST_SCALE
    assert (np.abs(_values(_mx(x, name, rule)) - x) <= allowed).all()


def test_mxfp4_is_that_of_ggml_but_for_ties(mx):
    """... which ggml rounds to the smaller magnitude, and we to even."""
    rows = ~np.isin(mx["case_of"], ("subnormal",))
    blocks = mx["ggml"][rows].reshape(-1, 17)
    codes = np.concatenate([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], axis=-1)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    wanted = np.ldexp(values, blocks[:, :1].astype(int) - 127).reshape(-1, 128)
    got = _values(_mx(mx["x"][rows], "e2m1", "floor"))
    differ = got != wanted
    assert set(mx["case_of"][rows][differ.any(-1)]) == {"ties_e2m1"}
    x = mx["x"][rows].astype(np.float64)
    np.testing.assert_array_equal(np.abs(got - x)[differ], np.abs(wanted - x)[differ])
    assert differ.sum() == 38 and (np.abs(got) > np.abs(wanted))[differ].all()


def _nvfp4_rule(x: np.ndarray, tensor_scale: float) -> np.ndarray:
    """Two levels in float64: scales of blocks are rounded to e4m3, subnormals included."""
    blocks = x.astype(np.float64).reshape(-1, 16)
    peak = np.abs(blocks).max(-1, keepdims=True)
    scale = np.clip(peak / 6 / tensor_scale, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn)
    exact = scale.astype(np.float64) * tensor_scale
    codes = np.clip(blocks / exact, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    return (codes.astype(np.float64) * exact).reshape(x.shape)


def _nv_cases(nv: dict[str, np.ndarray]) -> list[str]:
    return [c for c in dict.fromkeys(nv["case_of"]) if c not in (*BELOW, "zero")]


def test_nvfp4_is_that_of_torchao_but_for_its_clamp_of_small_scales(nv):
    """Values agree to the rounding of a product of two float32 scales; codes agree exactly."""
    names = list(dict.fromkeys(nv["case_of"]))
    for case in _nv_cases(nv):
        rows = nv["case_of"] == case
        x, scale = nv["x"][rows], nv["two.scale"][rows]
        codes = nv["two.codes"][rows].view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        tensor_scale = float(nv["tensor_scale"][names.index(case)])
        spread = np.repeat(scale.view(ml_dtypes.float8_e4m3fn).astype(np.float64), 16, axis=-1)
        wanted = codes * spread * tensor_scale
        # 2^-6 is the least normal e4m3: torchao goes no lower.
        clamped = np.repeat(scale == 8, 16, axis=-1)
        wanted[clamped] = _nvfp4_rule(x, tensor_scale)[clamped]
        got = _values(quantize_array(jnp.asarray(x), schemes.NVFP4))
        np.testing.assert_allclose(got, wanted, rtol=2.0**-22, err_msg=case)
        assert clamped.any() == (case in WIDE), case


def test_nvfp4_of_ggml_has_one_level(nv):
    """Blocks below its least scale are lost there and kept by us; others have close errors."""
    blocks = nv["ggml"].reshape(-1, 36)
    exponents = (blocks[:, :4] >> 3).astype(int)
    mantissas = (blocks[:, :4] & 7).astype(np.float64)
    scale = np.where(exponents > 0, (8 + mantissas) * 2.0 ** (exponents - 10), mantissas * 2.0**-9)
    packed = blocks[:, 4:].reshape(-1, 4, 8)
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale[..., None]
    theirs = values.reshape(-1, 128)
    for case in ("gauss", "heavy", "tiny"):
        rows = nv["case_of"] == case
        x = nv["x"][rows]
        ours = _values(quantize_array(jnp.asarray(x), schemes.NVFP4))
        their_error, our_error = (((v - x) ** 2).sum() for v in (theirs[rows], ours))
        if case == "tiny":
            assert (theirs[rows] == 0).all() and our_error < 0.02 * their_error
        else:
            assert 0.8 < our_error / their_error < 1.25


@pytest.mark.parametrize("scheme", [*(s for s, _ in MX.values()), schemes.NVFP4], ids=str)
def test_zeros_are_kept_beside_any_other_tile(scheme, nv):
    """A tile of zeros has no say in the scale of the tensor."""
    tiny = nv["x"][nv["case_of"] == "tiny"]
    both = np.concatenate([np.zeros_like(tiny), tiny])
    got = _values(quantize_array(jnp.asarray(both), scheme))
    assert (got[0] == 0).all()
    np.testing.assert_array_equal(got[1:], _values(quantize_array(jnp.asarray(tiny), scheme)))


@pytest.mark.parametrize("format", [E4M3, E5M2, E3M2, E2M3, E2M1], ids=str)
def test_casts_are_those_of_ml_dtypes(format: Format):
    """Every code's value, every midpoint and its neighbours, and what lies past the ends."""
    dtype = next(d for s, d in MX.values() if s.values == format)
    codes = np.arange(2**format.bits, dtype=np.uint8).view(dtype)
    values = np.unique(codes.astype(np.float32)[np.isfinite(codes.astype(np.float32))])
    middles = (values[:-1] + values[1:]) / 2
    x = np.concatenate(
        [values, middles, np.nextafter(middles, -np.inf), np.nextafter(middles, np.inf)]
    )
    got = np.asarray(decode(encode(jnp.asarray(x), format), format, jnp.float32))
    np.testing.assert_array_equal(got, x.astype(dtype).astype(np.float32))
    past = np.asarray([1e30, -1e30, 2 * format.highest], np.float32)
    ends = np.asarray(decode(encode(jnp.asarray(past), format), format, jnp.float32))
    np.testing.assert_array_equal(ends, [format.highest, format.lowest, format.highest])
