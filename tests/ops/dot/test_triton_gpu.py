"""Hopper's kernels in interpret mode: ragged shapes, gradients, maps, and what is refused.

Every scheme, case and layout is in tests/laws/test_dots.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from products import bound, Case, CASES, exact, operands, product, stored_for
from quantized import normal, SCHEMES

from jaxquant.ops import choose_backend, dot_general, Refusal
from jaxquant.ops._target import Device
from jaxquant.ops.dot import _triton_gpu
from jaxquant.ops.dot._api import make_call
from jaxquant.qarray import CANONICAL, Layout, leaf_specs, quantize_array, relayout

ROWS = Case(((3, 256), (256, 70)), ((1,), (0,)))


def _product(case: Case, x, w):
    return dot_general(x, w, case.numbers, backend="triton_gpu")


def _case(rows: int, k: int, n: int) -> Case:
    return Case(((rows, k), (k, n)), ((1,), (0,)))


def _check(case: Case, sides: list):
    x, w = sides[0], stored_for("triton_gpu", case, sides[1])
    got = jax.jit(lambda x, w: _product(case, x, w))(x, w)
    moved = np.abs(np.asarray(got).astype(np.float64) - product(case, *sides))
    halves = got.dtype == jnp.bfloat16
    assert (moved <= bound(case, *sides, halves=halves)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    "rows, k, n, name",
    [
        # One block of codes whose runs end within a tile, in groups that tiles cross.
        (3, 576, 70, "int4 zero g64"),
        (1, 576, 70, "int4 g32 bfloat16"),
        (3, 576, 24, "int2 zero g64"),
        (2, 200, 24, "int4 channel"),
        (2, 200, 24, "int8 channel"),
        (3, 576, 24, "nf4"),
        (3, 200, 24, "e4m3 channel"),
        # More rows than a tile holds, outputs beyond the last whole block, several tiles of k.
        (70, 640, 130, "int4 zero g64"),
        (17, 640, 130, "mxfp4"),
        (33, 512, 130, "int3 g32"),
        # Splits of the summed axis, the last of them with steps beyond its end.
        (2, 4224, 24, "int4 lowest g128 float16"),
        (2, 4160, 24, "int8 channel"),
    ],
)
def test_ragged_shapes(rows: int, k: int, n: int, name: str, dtype):
    case = _case(rows, k, n)
    _check(case, operands(case, None, name, dtype))


@pytest.mark.parametrize(
    "rows, k, n, activations, weight",
    [
        (3, 200, 70, "int8 channel", "int8 channel"),
        (17, 4096, 24, "int8 tensor", "int8 channel"),
        (17, 384, 24, "int8 g128 bfloat16", "int8 g128 bfloat16"),
        (5, 200, 24, "e4m3 channel", "e4m3 channel"),
        (5, 384, 256, "e4m3 g64 bfloat16", "e4m3 block"),
        (5, 200, 100, "e4m3 ragged block", "e4m3 ragged block"),
        (64, 4096, 24, "e5m2 tensor", "e5m2 tensor"),
    ],
)
def test_codes_by_codes(rows: int, k: int, n: int, activations: str, weight: str):
    case = _case(rows, k, n)
    _check(case, operands(case, activations, weight))


def test_the_summed_axis_is_split_where_blocks_are_few():
    """So that the cases above with long `k` do test sums over splits, and steps beyond the end."""
    for k, name in ((4224, "int4 lowest g128 float16"), (4160, "int8 channel")):
        case = _case(2, k, 24)
        x, w = operands(case, None, name)
        call = make_call(x, stored_for("triton_gpu", case, w), case.numbers)
        problem = _triton_gpu.weight_problem(call.lhs, call.rhs, call.out_dtype, True)
        assert problem.tiling.splits > 1
        assert problem.steps_of_split * problem.tiling.splits > problem.steps


@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64", "nf4"])
def test_gradients_in_activations_and_scales(name: str):
    x, q = operands(ROWS, None, name)
    w = stored_for("triton_gpu", ROWS, q)
    out = normal(3, 70, seed=7)

    def loss(x, scale):
        return (_product(ROWS, x, dataclasses.replace(w, scale=scale)) * out).sum()

    in_x = jax.grad(loss)(x, w.scale)
    o64, w64 = np.asarray(out).astype(np.float64), exact(q)
    size = np.abs(o64) @ np.abs(w64).T
    assert (np.abs(np.asarray(in_x) - o64 @ w64.T) <= (70 + 8) * 2.0**-24 * size).all()

    # The loss is linear in the scales.
    in_scale = np.asarray(jax.grad(loss, argnums=1)(x, w.scale)).astype(np.float64)
    scale = np.asarray(w.scale).astype(np.float64)
    total = (product(ROWS, x, q) * o64).sum()
    allowed = (256 * 70) * 2.0**-24 * (np.abs(exact(x)) @ np.abs(w64) * np.abs(o64)).sum()
    assert abs((in_scale * scale).sum() - total) <= allowed


def test_it_is_mapped_over_activations_and_over_weights():
    case = CASES["rows"]
    x, q = operands(case, None, "int4 zero g64")
    w = stored_for("triton_gpu", case, q)
    xs, ws = jnp.stack([x, 2 * x]), jax.tree.map(lambda a: jnp.stack([a, a]), w)
    once = _product(case, x, w)
    expected = jnp.stack([once, 2 * once])
    for axes in ((0, None), (0, 0)):
        got = jax.vmap(lambda x, w: _product(case, x, w), axes)(xs, ws if axes[1] == 0 else w)
        np.testing.assert_array_equal(got, expected)
    _, scanned = jax.lax.scan(lambda c, s: (c, _product(case, *s)), 0, (xs, ws))
    np.testing.assert_array_equal(scanned, expected)


def _refusal(x, w, case=ROWS) -> str:
    with pytest.raises(Refusal) as refusal:
        dot_general(x, w, case.numbers, out_dtype=jnp.float32, backend="triton_gpu")
    return str(refusal.value)


def test_what_it_is_not_made_for_is_refused():
    x, q = operands(ROWS, None, "int4 zero g64")
    w = stored_for("triton_gpu", ROWS, q)
    assert "not stored last; `jaxquant.prepare`" in _refusal(x, q)
    transposed = relayout(q, Layout(order=(-1, -2)))
    assert "not packed into bytes; `jaxquant.prepare`" in _refusal(x, transposed)
    assert "activations are float16" in _refusal(x.astype(jnp.float16), w)
    narrow = quantize_array(normal(8, 70), SCHEMES["int4 channel"], contracted=(0,))
    reason = _refusal(normal(3, 8), narrow, _case(3, 8, 70))
    assert "an axis of 8 codes of INT4 fills no tiles" in reason
    for name, reason in (
        ("int5 channel", "no decoder for INT5"),
        ("uint4 real zero g64", "zero points lie between codes"),
    ):
        _, other = operands(ROWS, None, name)
        assert reason in _refusal(x, other)
    tokens = quantize_array(x, SCHEMES["int8 channel"])
    assert "with their own kind, not (INT8, INT4)" in _refusal(tokens, w)
    _, byte = operands(ROWS, None, "int8 channel")
    assert "not stored last" in _refusal(tokens, byte)
    byte = stored_for("triton_gpu", ROWS, byte)
    middle = SCHEMES["int8 middle g32"]
    narrow_groups = quantize_array(x, dataclasses.replace(middle, tile=_tile(16)))
    assert "have no 32 neighbours in common" in _refusal(narrow_groups, byte)


def _tile(size: int):
    return dataclasses.replace(SCHEMES["int8 middle g32"].tile, contracted=size)


def test_it_is_for_gpus_unless_it_is_named():
    x, q = operands(ROWS, None, "int4 zero g64")
    w = stored_for("triton_gpu", ROWS, q)
    name, reasons = choose_backend(make_call(x, w, ROWS.numbers))
    assert name != "triton_gpu"
    assert reasons["triton_gpu"] == "it is for NVIDIA GPUs, and this is a cpu"


def _on_gpu(x, w, case=ROWS):
    call = make_call(x, w, case.numbers, out_dtype=jnp.float32)
    return dataclasses.replace(call, device=Device(platform="cuda", kind="NVIDIA H100 80GB HBM3"))


def test_on_a_gpu_it_is_passed_by_where_rows_are_many():
    x, q = operands(ROWS, None, "int4 zero g64")
    w = stored_for("triton_gpu", ROWS, q)
    assert choose_backend(_on_gpu(x, w))[0] == "triton_gpu"
    many = normal(257, 256)
    name, reasons = choose_backend(_on_gpu(many, w))
    assert name == "xla" and "257 rows are worth a product of XLA" in reasons["triton_gpu"]
    assert choose_backend(_on_gpu(many, w), "triton_gpu")[0] == "triton_gpu"
    byte = stored_for("triton_gpu", ROWS, operands(ROWS, None, "int8 channel")[1])
    tokens = quantize_array(x, SCHEMES["int8 channel"])
    assert choose_backend(_on_gpu(tokens, byte))[0] == "triton_gpu"
    many_tokens = quantize_array(many, SCHEMES["int8 channel"])
    assert "at the full rate" in choose_backend(_on_gpu(many_tokens, byte))[1]["triton_gpu"]


def test_several_devices_multiply_their_shards():
    """Column- and row-parallel: one all-reduce for the latter, and no weight is gathered."""
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("needs two devices")
    mesh = jax.sharding.Mesh(np.asarray(devices[:2]), ("model",))
    case = _case(4, 512, 64)
    x, q = operands(case, None, "int4 zero g64")
    w = stored_for("triton_gpu", case, q)
    for spec in (PartitionSpec(None, "model"), PartitionSpec("model", None)):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        run = jax.jit(
            lambda x, w, s=sharding: dot_general(
                x, w, case.numbers, sharding=s, backend="triton_gpu"
            )
        )
        specs = leaf_specs(w, spec, mesh)
        shards = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), specs)
        placed = jax.device_put(w, shards)
        text = run.lower(x, placed).compile().as_text()
        assert "all-gather" not in text
        assert ("all-reduce" in text) == (spec[0] is not None)
        moved = np.abs(np.asarray(run(x, placed)).astype(np.float64) - product(case, x, q))
        assert (moved <= bound(case, x, q, halves=False)).all()


def test_the_layout_is_packed_in_runs_of_64_where_the_axis_allows():
    def layout(k: int, name: str) -> Layout:
        w = quantize_array(normal(k, 8), SCHEMES[name], contracted=(0,))
        return _triton_gpu.layout_for(w, (0,), ())

    turned = (-1, -2)
    assert layout(256, "int4 channel") == Layout(order=turned, packed=128)
    assert layout(576, "int4 channel") == Layout(order=turned, packed=576)
    assert layout(512, "int2 zero g64") == Layout(order=turned, packed=256)
    assert layout(1024, "int3 g32") == Layout(order=turned, packed=512)
    assert layout(256, "int8 channel") == Layout(order=turned)
    assert layout(8, "int4 channel") == layout(256, "int5 channel") == CANONICAL
