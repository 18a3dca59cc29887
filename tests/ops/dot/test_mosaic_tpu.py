"""What the TPU backend takes and refuses; its products are in tests/laws/test_dots.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from products import CASES, operands
from quantized import SCHEMES

import jaxquant as jq
from jaxquant import aot
from jaxquant.numerics import BFLOAT16, INT4, UINT2, UINT3
from jaxquant.ops import choose_backend, dot_general, Refusal
from jaxquant.ops.dot import layout_for, make_call, preferred_backend
from jaxquant.qarray import CANONICAL, Layout, quantize_array, relayout, Scheme, Tile

NUMBERS = (((1,), (0,)), ((), ()))


def _quantized(scheme: Scheme, k: int = 256, n: int = 1024):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(k, n)), jnp.float32)
    return quantize_array(w, scheme, contracted=(0,))


def _refusal(x, w) -> str:
    with pytest.raises(Refusal) as refusal:
        dot_general(x, w, NUMBERS, out_dtype=jnp.float32, backend="mosaic_tpu")
    return str(refusal.value)


def test_what_it_does_not_read_is_refused_by_name():
    x = jnp.ones((8, 256))
    q = _quantized(SCHEMES["int8 channel"])
    assert "activations are float16" in _refusal(x.astype(jnp.float16), q)
    assert "stored by output" in _refusal(x, relayout(q, Layout(order=(-1, -2))))
    assert "no decoder for codes of INT5" in _refusal(x, _quantized(SCHEMES["int5 channel"]))
    assert "scales that are held as codes" in _refusal(x, _quantized(SCHEMES["nvfp4"]))
    assert "does not hold the table of NF4" in _refusal(x, _quantized(SCHEMES["nf4"]))
    packed = relayout(_quantized(SCHEMES["int4 zero g64"]), Layout(packed=64))
    assert "read unpacked" in _refusal(x, packed)
    two = Scheme(values=UINT2, tile=Tile(contracted=64))
    assert "packed blocks of 512 outputs" in _refusal(x, _quantized(two))


def test_on_a_cpu_it_answers_only_to_its_name():
    x, q = operands(CASES["rows"], None, "int8 channel")
    name, reasons = choose_backend(make_call(x, q, NUMBERS))
    assert name != "mosaic_tpu"
    assert reasons["mosaic_tpu"] == "it is for TPUs, and this is a cpu"


@pytest.mark.parametrize("name, block", [("int4 zero g64", None), ("int8 channel", None)])
def test_the_canonical_layout_is_read_where_inputs_come_first(name: str, block: int | None):
    q = _quantized(SCHEMES[name])
    assert layout_for("mosaic_tpu", q, (0,), ()) == CANONICAL
    turned = quantize_array(jnp.ones((64, 256)), SCHEMES[name], contracted=(1,))
    assert layout_for("mosaic_tpu", turned, (1,), ()) == Layout(order=(-1, -2))


@pytest.mark.parametrize("values, block", [(UINT2, 512), (UINT3, 1024)])
def test_few_bits_are_packed_along_the_outputs(values, block: int):
    scheme = Scheme(values=values, tile=Tile(contracted=64))
    q = _quantized(scheme, n=2048)
    layout = layout_for("mosaic_tpu", q, (0,), ())
    assert layout == Layout(packed=block)
    x = jnp.ones((3, 256))
    np.testing.assert_allclose(
        dot_general(x, relayout(q, layout), NUMBERS, backend="mosaic_tpu"),
        dot_general(x, q, NUMBERS, backend="reference"),
        rtol=1e-5,
        atol=1e-4,
    )
    # Where blocks do not divide the outputs, the layout stays, and the kernel refuses it.
    odd = _quantized(scheme, n=640)
    assert layout_for("mosaic_tpu", odd, (0,), ()) == CANONICAL


def test_stack_axes_stay_in_front():
    stacked = quantize_array(
        jnp.ones((128, 3, 256)), SCHEMES["int8 channel"], contracted=(0,), stack=(1,)
    )
    assert layout_for("mosaic_tpu", stacked, (0,), (1,)) == Layout(order=(-2, -3, -1))
    several = quantize_array(jnp.ones((64, 4, 32)), SCHEMES["int8 channel"], contracted=(0,))
    assert layout_for("mosaic_tpu", several, (0,), ()) == CANONICAL


def test_on_a_tpu_it_is_the_first_choice_for_few_rows_and_xla_for_many():
    q = _quantized(SCHEMES["int4 zero g64"])
    xs = {rows: jnp.ones((rows, 256), jnp.bfloat16) for rows in (16, 8192)}
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert preferred_backend() == "mosaic_tpu"
        calls = {r: make_call(x, q, NUMBERS, out_dtype=jnp.bfloat16) for r, x in xs.items()}
        chosen = {rows: choose_backend(call) for rows, call in calls.items()}
        named = {rows: choose_backend(call, "mosaic_tpu") for rows, call in calls.items()}
    assert chosen[16] == ("mosaic_tpu", {})
    assert chosen[8192][0] == "xla"
    assert "and there are 8192" in chosen[8192][1]["mosaic_tpu"]
    assert all(found == ("mosaic_tpu", {}) for found in named.values())


@pytest.mark.parametrize("name", ["int4 lowest g128 float16", "e4m3 block", "mxfp4", "fp4"])
def test_scales_and_tables_of_other_formats_in_bfloat16(name: str):
    q = _quantized(SCHEMES[name])
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 256)), jnp.bfloat16)
    got, expected = (
        dot_general(x, q, NUMBERS, out_dtype=jnp.float32, backend=b)
        for b in ("mosaic_tpu", "reference")
    )
    # A table's entry is rounded to bfloat16 once.
    allowed = (
        2.0**-8
        * np.abs(np.asarray(x).astype(np.float64))
        @ np.abs(np.asarray(dot_general(jnp.eye(256), q, NUMBERS, backend="reference")))
    )
    assert (np.abs(np.asarray(got) - np.asarray(expected)) <= allowed).all()


class Layers(nn.Module):
    """Four layers of one matrix each, stacked by `nn.scan` and recomputed by `nn.remat`."""

    @nn.compact
    def __call__(self, x):
        layer = nn.scan(
            nn.remat(OneLayer), variable_axes={"params": 0}, split_rngs={"params": True}, length=4
        )
        return layer(name="layers")(x, None)[0]


class OneLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(1024, use_bias=False, dtype=x.dtype)(x), None


def _layers():
    scheme = Scheme(values=INT4, tile=Tile(contracted=128), scale=BFLOAT16)
    recipe = jq.Recipe(name="g128", rules=(jq.Rule(match="*", weights=scheme),))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 1024)), jnp.bfloat16)
    variables = Layers().init(jax.random.key(0), x)
    plan = jq.plan(Layers(), variables, x, recipe=recipe)
    return plan, jq.prepare(jq.quantize(variables, plan), plan, backend="mosaic_tpu"), x


def test_in_a_loop_over_layers_each_is_read_where_it_lies():
    plan, qvariables, x = _layers()
    got, expected = (
        jax.jit(jq.wrap(Layers(), plan, backend=name).apply)(qvariables, x).astype(jnp.float32)
        for name in ("mosaic_tpu", "reference")
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=2.0**-6 * np.abs(expected).max())


@pytest.mark.aot
def test_a_loop_over_layers_moves_each_layer_once():
    plan, qvariables, x = _layers()
    program = aot.compile_for(
        jq.wrap(Layers(), plan, backend="mosaic_tpu").apply,
        (qvariables, x),
        aot.TARGETS["v5e"],
        schedule=False,
    )
    codes = 4 * 1024 * 1024 // 2
    needed = codes + codes // 64 * 2 + 5 * 8 * 1024 * 2
    assert program.hlo.bytes_moved <= 1.1 * needed
    assert program.hlo.custom_calls["jaxquant_weight_product"] == 4, program.hlo.custom_calls
