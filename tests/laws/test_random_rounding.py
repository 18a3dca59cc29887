"""Rounding at random, for every format: to a neighbour, and right on average.

Keys are fixed, so that a test passes always or never; all tests together would refuse a right
implementation for one choice of key in a million (`FALSE_ALARM`, shared among formats).
"""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from code_values import every_value, values_of

from jaxquant.numerics import encode, FLOAT16, Format, FORMATS, INT4, MinMax, UINT3, UINT8
from jaxquant.qarray import dequantize, PER_CHANNEL, quantize_array, Scheme, schemes

pytestmark = pytest.mark.tables

ROUNDED = [f for f in FORMATS.values() if f.bits <= 8 and not f.power_of_two] + [FLOAT16]
every_format = pytest.mark.parametrize("format", ROUNDED, ids=repr)
POINTS, DRAWS = 24, 8192
FALSE_ALARM = 1e-6
# Standard deviations that a sum of so many draws exceeds that rarely; and, by Hoeffding, the
# distance of a mean of DRAWS numbers between 0 and 1 from its expectation.
DEVIATIONS = -statistics.NormalDist().inv_cdf(FALSE_ALARM / 4 / len(ROUNDED))
HOEFFDING = math.sqrt(math.log(4 * len(ROUNDED) * POINTS / FALSE_ALARM) / (2 * DRAWS))


def _points(format: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers between neighbours of a format, at all heights of the gap, and those neighbours."""
    if format is FLOAT16:
        low = np.linspace(-2, 2, 97).astype(np.float16)
        high = np.nextafter(low, np.float16(9)).astype(np.float64)
        low = low.astype(np.float64)
    else:
        found = every_value(format)
        low, high = found[:-1], found[1:]
    rng = np.random.default_rng(format.bits)
    at = rng.integers(0, len(low), POINTS)
    height = (np.arange(POINTS) + 0.5) / POINTS
    x = (low[at] + height * (high[at] - low[at])).astype(np.float32)
    return x, low[at], high[at]


@functools.cache
def _draws(format: Format) -> np.ndarray:
    """What each point was rounded to, DRAWS times, in float64."""
    x, _, _ = _points(format)
    run = jax.jit(lambda x, key: encode(x, format, key))
    codes = run(jnp.asarray(np.broadcast_to(x, (DRAWS, POINTS))), jax.random.key(17))
    return values_of(np.asarray(codes), format)


@every_format
def test_a_number_goes_to_one_of_its_neighbours(format: Format):
    _, low, high = _points(format)
    found = _draws(format)
    assert ((found == low) | (found == high)).all()
    assert (found == low).any() and (found == high).any()


@every_format
def test_it_is_right_on_average(format: Format):
    x, low, high = _points(format)
    up = _draws(format) == high
    chance = (x.astype(np.float64) - low) / (high - low)
    # One point alone, and all of them together.
    assert (np.abs(up.mean(axis=0) - chance) <= HOEFFDING).all()
    spread = math.sqrt(DRAWS * (chance * (1 - chance)).sum())
    assert abs(up.sum() - DRAWS * chance.sum()) <= DEVIATIONS * spread


@every_format
def test_values_of_the_format_are_left_alone(format: Format):
    found = np.float32([0, 1, -1, 0.5]) if format is FLOAT16 else every_value(format)
    x = jnp.asarray(np.broadcast_to(found.astype(np.float32), (64, len(found))))
    got = jax.jit(lambda x, key: encode(x, format, key))(x, jax.random.key(3))
    np.testing.assert_array_equal(values_of(np.asarray(got), format), np.asarray(x))


@every_format
def test_what_lies_past_an_end_goes_there(format: Format):
    x = jnp.asarray([1e30, -1e30, jnp.inf, -jnp.inf])
    got = jax.jit(lambda x, key: encode(x, format, key))(x, jax.random.key(3))
    assert values_of(np.asarray(got), format).tolist() == [format.highest, format.lowest] * 2


def test_other_keys_give_other_codes_and_the_same_key_the_same():
    x = jnp.linspace(-7, 7, 999)
    one, again, other = (encode(x, INT4, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != np.asarray(other)).mean() > 0.1


SCHEMES = {
    "asymmetric": Scheme(values=UINT3, tile=PER_CHANNEL, range=MinMax(), zero_point=UINT3),
    "asymmetric, apart from 0": Scheme(
        values=UINT3, tile=PER_CHANNEL, range=MinMax(include_zero=False), zero_point=UINT8
    ),
    "symmetric": Scheme(values=INT4, tile=PER_CHANNEL),
    "a table": schemes.NF4,
    "scales held as codes": schemes.NVFP4,
}


@pytest.mark.parametrize("name", SCHEMES)
def test_an_array_is_right_on_average_where_nothing_is_clipped(name: str):
    scheme, draws = SCHEMES[name], 4096
    x = np.random.default_rng(5).standard_normal((2, 64)).astype(np.float32)
    if "apart" in name:
        x = x - 9
    run = jax.jit(jax.vmap(lambda key: dequantize(quantize_array(jnp.asarray(x), scheme, key=key))))
    found = np.asarray(run(jax.random.split(jax.random.key(0), draws))).astype(np.float64)
    low, high = found.min(axis=0), found.max(axis=0)
    # Not what is an end of the range, or nearly a value of the format: it goes to one side only.
    inside = (low < x) & (x < high)
    assert inside.mean() > 0.5
    distance = np.abs(found.mean(axis=0) - x) / np.where(inside, high - low, 1)
    allowed = math.sqrt(math.log(2 * x.size * len(SCHEMES) / FALSE_ALARM) / (2 * draws))
    # Twice rounded: by the reciprocal of the scale, and by the scale.
    assert (distance <= allowed + 2.0**-18)[inside].all()
    two = (found == low) | (found == high)
    assert two[:, inside].all()
