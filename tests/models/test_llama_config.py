"""What a config refuses, and the rope scaling of Llama 3.1."""

import dataclasses
import math

import pytest

from jaxquant.models import LlamaConfig
from jaxquant.models._llama_config import llama3_factors

GOOD = LlamaConfig(
    vocab_size=8,
    width=32,
    hidden=32,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    norm_epsilon=1e-5,
    max_length=64,
    tied=True,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers is 0; a positive integer"),
        ({"width": True}, "width is True"),
        ({"hidden": 2**63}, "hidden is 9223372036854775808"),
        ({"heads": 3}, "3 heads and 2 kv_heads"),
        ({"head_dim": 7}, "head_dim is 7; rotation pairs need it even"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0"),
        ({"rope_factors": (1.0,)}, "rope_factors has 1 numbers"),
        ({"rope_factors": (1.0, 1.0, 1.0, -1.0)}, "rope_factors must be positive"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GOOD, **change)


def test_a_config_is_hashable():
    assert hash(GOOD) == hash(dataclasses.replace(GOOD))


def test_llama3_factors_keep_fast_pairs_and_slow_slow_ones():
    factors = llama3_factors(
        head_dim=128, theta=500000.0, factor=8.0, low=1.0, high=4.0, original_length=8192
    )
    assert factors[0] == 1.0 and factors[-1] == 8.0
    assert list(factors) == sorted(factors)
    # The pair that turns 2.25 times in 8192 tokens, by hand: kept = 1.25 / 3.
    pair = next(i for i, f in enumerate(factors) if 1 < f < 8)
    turns = 8192 * 500000.0 ** (-2 * pair / 128) / (2 * math.pi)
    kept = (turns - 1) / 3
    assert math.isclose(1 / factors[pair], kept + (1 - kept) / 8)


@pytest.mark.parametrize("change", [{"factor": 0.0}, {"high": 1.0}, {"theta": -1.0}])
def test_a_scaling_that_makes_no_sense_is_refused(change):
    good = {"head_dim": 8, "theta": 1e4, "factor": 8.0, "low": 1.0, "high": 4.0}
    with pytest.raises(ValueError, match="llama3 rope scaling"):
        llama3_factors(**{**good, "original_length": 8192, **change})
