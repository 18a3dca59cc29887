"""Where arrays lie: whole heads and whole columns on each device, and data that `load` takes."""

import math

import pytest
from jax.sharding import PartitionSpec as P

from jaxquant.aot import tensor_parallel
from jaxquant.models import LlamaConfig


def _config(**sizes):
    usual = {"width": 4096, "hidden": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128}
    fixed = {"layers": 2, "rope_theta": 1e4, "norm_epsilon": 1e-5, "max_length": 8192}
    return LlamaConfig(**{"vocab_size": 128256, "tied": False, **usual, **fixed, **sizes})


def test_eight_key_heads_on_eight_devices_need_one_axis():
    found = tensor_parallel(_config(), 8, batch=16, length=4096)
    assert found.axes == {"kv": 8}
    assert found.spec("layers/1/attention/q/kernel") == P(None, ("kv",))
    assert found.spec("layers/1/attention/v/kernel") == P(None, ("kv",))
    assert found.spec("layers/1/attention/o/kernel") == P(("kv",), None)
    assert found.spec("layers/0/mlp/gate/kernel") == P(None, ("kv",))
    assert found.spec("layers/0/mlp/down/kernel") == P(("kv",), None)
    assert found.spec("embed/embedding") == P(("kv",), None)
    assert found.spec("head/kernel") == P(None, ("kv",))
    assert found.spec("layers/0/mlp_norm/scale") == found.spec("norm/scale") == P()
    assert found.cache == P(None, None, ("kv",), None)


def test_more_devices_than_key_heads_split_query_heads_and_rows():
    found = tensor_parallel(_config(width=8192, heads=64), 16, batch=16, length=4096)
    assert found.axes == {"kv": 8, "rest": 2}
    assert found.spec("layers/0/attention/q/kernel") == P(None, ("kv", "rest"))
    assert found.spec("layers/0/attention/k/kernel") == P(None, ("kv",))
    assert found.spec("layers/0/mlp/down/kernel") == P(("kv", "rest"), None)
    assert found.cache == P(("rest",), None, ("kv",), None)
    # One row cannot be split: its tokens are.
    one = tensor_parallel(_config(width=8192, heads=64), 16, batch=1, length=4096)
    assert one.cache == P(None, ("rest",), ("kv",), None)
    odd = tensor_parallel(_config(width=8192, heads=64), 16, batch=1, length=4095)
    assert odd.cache == P(None, None, ("kv",), None)


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {
            "heads": 9,
            "kv_heads": 3,
            "width": 576,
            "head_dim": 64,
            "hidden": 1536,
            "vocab_size": 49152,
        },
        {"heads": 28, "kv_heads": 4, "width": 3584, "hidden": 18944, "vocab_size": 152064},
        {"heads": 1, "kv_heads": 1, "hidden": 999, "vocab_size": 101},
    ],
)
def test_every_array_is_divided_by_its_devices(devices, sizes):
    config = _config(**sizes)
    found = tensor_parallel(config, devices, batch=3, length=77)
    assert math.prod(found.axes.values()) == devices

    def count(entry):
        names = entry if isinstance(entry, tuple) else (entry,)
        return math.prod(found.axes.get(name, 1) for name in names)

    assert config.heads % count(found.spec("layers/0/attention/q/kernel")[1]) == 0
    assert config.kv_heads % count(found.spec("layers/0/attention/k/kernel")[1]) == 0
    assert config.hidden % count(found.spec("layers/0/mlp/up/kernel")[1]) == 0
    assert config.vocab_size % count(found.spec("embed/embedding")[0]) == 0
    for size, entry in zip((3, 77, config.kv_heads), found.cache, strict=False):
        assert size % count(entry) == 0
    if devices == 1:
        assert not any(any(spec) for spec in found.rules.values())
