"""Models on slices that are not here: every byte has a name, and no weight is gathered."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxquant import recipes
from jaxquant.aot import compile_step, DecoderStep, lay_out, parse_target
from jaxquant.intercept import Plan, plan
from jaxquant.models import Llama, LlamaConfig, Outline

pytestmark = pytest.mark.aot

CONFIG = LlamaConfig(
    vocab_size=2048,
    width=1024,
    hidden=2048,
    layers=2,
    heads=16,
    kv_heads=8,
    head_dim=128,
    rope_theta=1e4,
    norm_epsilon=1e-5,
    max_length=4096,
    tied=False,
)
DECODE = DecoderStep(rows=16, new=1, seen=256)
PREFILL = DecoderStep(rows=1, new=256, seen=0)


def _outline(made: Plan | None = None, **changed) -> Outline:
    config = dataclasses.replace(CONFIG, **changed)
    dtype = jnp.bfloat16 if made is None else jnp.float32
    return Outline(config=config, plan=made, param_dtype=dtype, source="shapes")


def _laid(target="v5e:2x4", recipe=recipes.W4A16_G128, outline=None, **sizes):
    chip, shape = parse_target(target)
    sizes = {"batch": 16, "length": 256, **sizes}
    return lay_out(outline or _outline(), recipe, chip, shape, **sizes)


BLOCK = 1024 * 2048 * 2 + 1024 * 1024 * 2 + 3 * 1024 * 2048
"""Weights of a block: q and o, k and v, gate, up and down."""


@pytest.mark.parametrize("target", ["v5e:2x4", "v6e:4x4"])
def test_decode_is_accounted_for_and_gathers_no_weight(target):
    laid = _laid(target)
    devices = laid.devices
    found = compile_step(laid, DECODE)
    assert found.compiled is not None and found.refused is None and found.fits
    # Keys and values are whole on two devices each where there are sixteen.
    own = 2 * 1024 * 1024
    weights = (BLOCK - own) / devices + own / 8
    assert found.held["codes"] == 2 * weights / 2
    assert found.held["scales"] == 2 * 2 * weights / 128
    assert found.held["norms and biases"] == 2 * 5 * 1024
    assert found.held["head"] == found.held["embedding"] == 2 * 1024 * 2048 // devices
    assert found.held["cache"] == 2 * 2 * 16 * 256 * 8 * 128 * 2 // devices
    assert found.held["tokens and position"] == 4 * 16 + 4
    assert found.held["logits"] == 4 * 16 * 2048 // devices
    total = found.compiled.memory.total
    assert abs(found.unaccounted) <= 0.03 * total
    assert sum(found.parts.values()) + found.unaccounted == total
    # The new cache takes the memory of the old one.
    assert found.compiled.memory.aliased >= found.held["cache"]
    assert found.moving_weights == ()
    assert found.compiled.hlo.custom_calls["jaxquant_weight_product"] == 2 * 7
    assert {backend for _, backend, _ in laid.plan.backends} == {"mosaic_tpu"}
    # The least that moves is weights, head, cache and a few rows.
    held = found.held["codes"] + found.held["scales"] + found.held["head"] + found.held["cache"]
    assert held < found.roofline.bytes < 1.05 * held
    assert found.roofline.bytes <= found.compiled.hlo.bytes_moved + found.held["embedding"]
    assert found.compiled.scheduled().seconds > 0
    sums = [each for each in found.compiled.hlo.collectives if each.kind == "all-reduce"]
    # Attention and MLP of each layer end in one.
    assert sum(each.shapes == ("bf16[16,1024]",) for each in sums) >= 4


def test_prefill_is_accounted_for():
    found = compile_step(_laid(), PREFILL, schedule=False)
    assert found.compiled is not None and found.fits
    assert found.held["cache"] == 2 * 2 * 256 * 128 * 2
    assert found.moving_weights == ()
    assert abs(found.unaccounted) <= 0.03 * found.compiled.memory.total
    assert found.roofline.operations["bf16"] > 2 * 256 * 2 * BLOCK / 8
    assert len(found.largest) <= 3 and all(size > 0 for _, size in found.largest)


def test_shards_that_cut_tiles_are_seen_to_gather():
    # 1536 / 8 is one and a half groups of 128: XLA gathers the codes of `down`, and it is said.
    laid = _laid(outline=_outline(hidden=1536))
    found = compile_step(laid, PREFILL, schedule=False)
    assert any(each.kind == "all-gather" for each in found.moving_weights)
    down = laid.plan.by_path["layers/0/mlp/down/kernel"]
    assert down.replicated == (0,)


def test_a_float_model_is_held_in_bfloat16():
    laid = _laid("v5e", None)
    found = compile_step(laid, DECODE, schedule=False)
    assert laid.plan is None and set(laid.held) == {
        *("matrices left as they are", "norms and biases", "head", "embedding")
    }
    assert laid.held["matrices left as they are"] == 2 * 2 * BLOCK
    assert found.fits and found.moving_weights == ()
    assert laid.parameters == 2 * BLOCK + 2 * 1024 * 2048 + 5 * 1024


def test_a_quantized_model_keeps_its_plan():
    model = Llama.abstract(CONFIG)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    made = plan(model, nnx.state(model), tokens, recipe=recipes.W8A16)
    laid = _laid("v5e:2x4", None, _outline(made))
    assert laid.plan == made and laid.plan.by_path["layers/0/mlp/down/kernel"].spec == ("kv", "")
    assert laid.held["codes"] == 2 * BLOCK // 8
    # What is left is held as the folder holds it.
    assert laid.held["head"] == 4 * 1024 * 2048 // 8
    assert compile_step(laid, DECODE, schedule=False).moving_weights == ()
    with pytest.raises(ValueError, match="quantized already, by the recipe 'w8a16'"):
        _laid("v5e:2x4", recipes.W8A16, _outline(made))


def test_static_scales_are_state_of_their_own():
    laid = _laid("v5e:2x4", recipes.SMOOTHQUANT_W8A8_STATIC)
    assert laid.held["other state"] > 0
    found = compile_step(laid, DECODE, schedule=False)
    assert found.moving_weights == () and found.roofline.operations["int8"] > 0


@pytest.mark.parametrize(
    ("length", "said"),
    # 16 rows of 8 KiB a token are all of what libtpu gives of 16 GiB, then more than there is.
    [(129024, "Ran out of memory|exceed"), (1 << 22, "arrays alone take [0-9]+ bytes")],
)
def test_what_does_not_fit_is_an_answer(length, said):
    found = compile_step(_laid("v5e", length=length), DecoderStep(rows=16, new=1, seen=length))
    assert not found.fits and found.compiled is None and found.unaccounted is None
    assert found.held["cache"] == 2 * 2 * 16 * length * 8 * 128 * 2
    assert re.search(said, found.refused)
    assert found.parts == found.held and found.largest == ()
