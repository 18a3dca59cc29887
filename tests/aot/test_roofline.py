"""Bounds by hand: two operations a weight and token, bytes at the bandwidth."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxquant import recipes
from jaxquant.aot import DecoderStep, parse_target, roofline
from jaxquant.aot._roofline import products
from jaxquant.intercept import plan
from jaxquant.models import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=256,
    width=128,
    hidden=384,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=64,
    rope_theta=1e4,
    norm_epsilon=1e-5,
    max_length=64,
    tied=False,
)
# q and o, k and v, gate and up and down.
BLOCK = 2 * 128 * 256 + 2 * 128 * 128 + 3 * 128 * 384


def _plan(recipe):
    state = nnx.state(Llama.abstract(CONFIG))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return plan(Llama.abstract(CONFIG), state, tokens, recipe=recipe)


def test_products_are_all_matrices_of_the_model():
    shapes = {path: shape for path, shape, _ in products(CONFIG, None)}
    model = nnx.state(Llama.abstract(CONFIG))
    stored = {
        "/".join(map(str, path)): v.shape
        for path, v in nnx.to_flat_state(model)
        if path[-1] == "kernel"
    }
    assert shapes == stored


@pytest.mark.parametrize("devices", [1, 4])
def test_decode_multiplies_each_weight_by_each_row(devices):
    target, _ = parse_target("v5e")
    step = DecoderStep(rows=5, new=1, seen=100)
    found = roofline(target, CONFIG, None, step, devices=devices, bytes=8190)
    weights = 2 * 5 * (3 * BLOCK + 128 * 256)
    # Each query meets 100 keys and its own, and as many values.
    attention = 4 * 3 * 256 * 5 * 101
    assert found.operations == {"bf16": pytest.approx((weights + attention) / devices)}
    assert found.memory_seconds == pytest.approx(1e-8)
    assert found.compute_seconds == pytest.approx((weights + attention) / devices / 197e12)
    assert found.seconds == max(found.memory_seconds, found.compute_seconds)


def test_prefill_looks_back_and_needs_the_logits_of_one_token():
    target, _ = parse_target("v5e")
    found = roofline(target, CONFIG, None, DecoderStep(rows=2, new=8, seen=0), devices=1, bytes=0)
    attention = 4 * 3 * 256 * 2 * (8 * 9 // 2)
    wanted = 2 * 16 * 3 * BLOCK + 2 * 2 * 128 * 256 + attention
    assert found.operations == {"bf16": wanted}


@pytest.mark.parametrize(
    ("recipe", "chip", "type_"),
    [
        (recipes.W8A16, "v5e", "bf16"),
        (recipes.W4A16_G128, "v6e", "bf16"),
        (recipes.W8A8, "v5e", "int8"),
        (recipes.FP8, "v6e", "fp8"),
        # No rate of its own there: it runs as bfloat16.
        (recipes.FP8, "v5e", "bf16"),
        (recipes.MXFP8, "7x", "fp8"),
    ],
)
def test_a_narrow_rate_needs_both_sides_narrow(recipe, chip, type_):
    target, _ = parse_target(chip)
    step = DecoderStep(rows=1, new=1, seen=1)
    found = roofline(target, CONFIG, _plan(recipe), step, devices=1, bytes=0)
    assert found.operations[type_] >= 2 * 3 * BLOCK
    # The head is left in bfloat16.
    assert found.operations["bf16"] >= 2 * 128 * 256
