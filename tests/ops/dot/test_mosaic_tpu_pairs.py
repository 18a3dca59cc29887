"""Both sides quantized on TPU: which calls are taken, rounding inside, gradients, several devices.

What the kernel computes is in test_mosaic_tpu_codes.py, and for all cases in tests/laws/.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from products import bound, Case, product
from quantized import normal, same_bits, SCHEMES, uneven

from jaxquant.aot import compile_for, TARGETS
from jaxquant.numerics import E4M3, INT4, INT8
from jaxquant.ops import choose_backend, dot_general, quantize_activation
from jaxquant.ops._target import Device
from jaxquant.ops.dot import _mosaic_tpu, _mosaic_tpu_pairs as pairs
from jaxquant.ops.dot._api import make_call
from jaxquant.ops.dot._call import Layer
from jaxquant.ops.dot._mosaic_tpu_codes import Feed
from jaxquant.qarray import abstract_qarray, place, quantize_array, Scheme, schemes, Tile

ROWS = (((1,), (0,)), ((), ()))
MESH = Mesh(np.asarray(jax.devices()), ("x",))
G128 = Tile(contracted=128)

# Of activations and weight.
SIDES = {
    "w8a8": (SCHEMES["int8 channel"], SCHEMES["int8 channel"]),
    "w4a8": (SCHEMES["int8 channel"], SCHEMES["int4 channel"]),
    "fp8": (SCHEMES["e4m3 channel"], SCHEMES["e4m3 channel"]),
    "fp8 blocks": (Scheme(values=E4M3, tile=G128), schemes.E4M3_BLOCK),
    "int8 groups": (Scheme(values=INT8, tile=G128), Scheme(values=INT4, tile=G128)),
    "middle": (dataclasses.replace(SCHEMES["int8 middle g32"], tile=G128), SCHEMES["int8 channel"]),
}
every_pair = pytest.mark.parametrize("name", SIDES)


@functools.cache
def _weight(name: str, k: int = 384, n: int = 200):
    return jax.jit(lambda w: quantize_array(w, SIDES[name][1], contracted=(0,)))(uneven(k, n))


def _activations(rows: int, dtype=jnp.float32, k: int = 384) -> jax.Array:
    """Rows of very different sizes, one of zeros, some with what no code stands for."""
    x = np.array(normal(rows, k, seed=3)) * 10.0 ** (np.arange(rows) % 9 * 8 - 36)[:, None]
    if rows > 4:
        x[2], x[3, 5], x[4, 7] = 0, np.nan, np.inf
    return jnp.asarray(x, dtype)


def _inside(x, w, scheme, **keywords):
    return dot_general(x, w, ROWS, activations=scheme, backend="mosaic_tpu", **keywords)


@pytest.mark.parametrize("rows, dtype", [(1, "float32"), (9, "bfloat16"), (96, "float32")])
@every_pair
def test_rounding_inside_gives_the_bits_of_rounding_before(name: str, rows: int, dtype: str):
    scheme, w = SIDES[name][0], _weight(name)
    x = _activations(rows, jnp.dtype(dtype))
    inside = jax.jit(lambda x, w: _inside(x, w, scheme, out_dtype=jnp.float32))(x, w)

    @jax.jit
    def before(x, w):
        q = quantize_activation(x, scheme, contracted=(1,))
        return dot_general(q, w, ROWS, out_dtype=jnp.float32, backend="mosaic_tpu")

    assert same_bits(inside, before(x, w))
    if rows > 4:
        lost = np.isnan(np.asarray(inside)).all(axis=1)
        assert lost[3] and not lost[[0, 1, 2]].any() and (np.asarray(inside)[2] == 0).all()


@every_pair
def test_the_api_rounds_where_a_backend_does_not(name: str):
    scheme, w, x = SIDES[name][0], _weight(name), normal(9, 384, seed=3)
    q = quantize_activation(x, scheme, contracted=(1,))
    for backend in ("xla", "reference", None):
        got = dot_general(x, w, ROWS, activations=scheme, backend=backend)
        assert same_bits(got, dot_general(q, w, ROWS, backend=backend))
    case = Case(((9, 384), (384, 200)), ((1,), (0,)))
    moved = np.abs(np.asarray(_inside(x, w, scheme)) - product(case, q, w))
    assert (moved <= bound(case, q, w, halves=False)).all()


def test_what_is_rounded_otherwise_is_rounded_before():
    """By the API, for the same kernel."""
    x, w = normal(9, 384, seed=3), _weight("w8a8")
    for name in ("int8 tensor", "int8 g128 bfloat16"):
        q = quantize_activation(x, SCHEMES[name], contracted=(1,))
        got = _inside(x, w, SCHEMES[name])
        assert same_bits(got, dot_general(q, w, ROWS, backend="mosaic_tpu"))


@pytest.mark.parametrize("name", ["w8a8", "fp8 blocks"])
def test_long_rows_are_rounded_whole_and_multiplied_in_steps(name: str):
    k, n, scheme = 9216, 130, SIDES[name][0]
    w, x = _weight(name, k, n), normal(3, k, seed=3)
    case = Case(((3, k), (k, n)), ((1,), (0,)))
    q = quantize_activation(x, scheme, contracted=(1,))
    got = _inside(x, w, scheme)
    assert same_bits(got, dot_general(q, w, ROWS, backend="mosaic_tpu"))
    moved = np.abs(np.asarray(got) - product(case, q, w))
    assert (moved <= bound(case, q, w, halves=False)).all()


def test_the_plain_side_may_be_the_right_one():
    w = quantize_array(uneven(200, 384).T, SCHEMES["int8 channel"], contracted=(0,))
    x = normal(9, 384, seed=3)
    numbers = (((0,), (1,)), ((), ()))
    got = dot_general(w, x, numbers, activations=SCHEMES["int8 channel"], backend="mosaic_tpu")
    assert same_bits(got.T, _inside(x, w, SCHEMES["int8 channel"]))


def test_activations_without_one_plain_side_are_an_error():
    w, scheme = _weight("w8a8"), SCHEMES["int8 channel"]
    x = normal(9, 384)
    with pytest.raises(ValueError, match="here both are. Leave it out, or quantize the weight"):
        make_call(quantize_array(x, scheme), w, ROWS, activations=scheme)
    with pytest.raises(ValueError, match="here neither is"):
        make_call(x, normal(384, 200), ROWS, activations=scheme)


def _call(name: str, *, kind: str = "TPU v5 lite", rows: int = 16, **keywords):
    scheme = keywords.pop("activations", SIDES[name][0])
    call = make_call(jnp.zeros((rows, 384)), _weight(name), ROWS, activations=scheme)
    return dataclasses.replace(call, device=Device(platform="tpu", kind=kind), **keywords)


REFUSED = {
    "int8 zero channel": "INT8 less its zero point does not fit int8",
    "int4 zero g64": "sums of codes with zero points are not computed",
    "int8 middle g32": "scales for every 32 along 384 are finer than the 128 that are summed",
    "nvfp4": "multiplies integers with integers and floats with floats",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_with_the_reason(name: str):
    call = _call("w8a8", activations=SCHEMES[name])
    seen = call if _mosaic_tpu.rounds(call) else call.rounded_shapes()
    assert re.search(REFUSED[name], _mosaic_tpu.refuses(seen))


ROUNDED_BEFORE = {
    "int4 zero g64": "rounding to int4.zero g64 is not done inside",
    "int8 g128 bfloat16": "rounding to int8 g128 is not done inside",
    "int4 signed g32": "ranges of AbsMax.*SIGNED.* are not found inside",
    "int8 tensor": "rows that share a scale are not rounded inside",
    "int8 middle g32": "tiles of 32 are not rounded inside",
}


@pytest.mark.parametrize("name", ROUNDED_BEFORE)
def test_what_is_not_rounded_inside_has_a_reason(name: str):
    reason = pairs.refuses_rounding(_call("w8a8", activations=SCHEMES[name]))
    assert reason is not None and re.search(ROUNDED_BEFORE[name], reason)


KINDS = {"TPU v4": 4, "TPU v5 lite": 5, "TPU v6 lite": 6, "TPU7x": 7}


@pytest.mark.parametrize("kind", KINDS)
def test_each_generation_multiplies_what_its_matrix_unit_has(kind: str):
    generation = KINDS[kind]

    def ways(name: str):
        pair = pairs._pair(_weight(name), SIDES[name][0].values, 384, generation, None)
        assert not isinstance(pair, str)
        return pair.left.name, pair.right, pair.longest

    if generation in (5, 6):
        assert ways("w8a8") == ("int8", Feed.STORED, 384)
        assert ways("w4a8") == ("int8", Feed.INT8, 384)
        assert ways("fp8") == ("bfloat16", Feed.BIAS_11, 384)
    else:
        assert ways("w8a8") == ways("w4a8") == ("bfloat16", Feed.BFLOAT16, 1024)
    if generation == 4:
        assert ways("fp8") == ("bfloat16", Feed.BFLOAT16, 384)
    if generation == 7:
        assert ways("fp8") == ("float8_e4m3fn", Feed.STORED, 384)


def test_a_step_fits_into_a_cores_memory():
    for generation in KINDS.values():
        for name, k, n in [("w8a8", 4096, 4096), ("fp8", 14336, 4096), ("fp8 blocks", 8192, 28672)]:
            w = abstract_qarray((k, n), jnp.float32, SIDES[name][1], contracted=(0,))
            scheme = SIDES[name][0]
            pair = pairs._pair(w, scheme.values, scheme.tile.contracted or k, generation, scheme)
            for rows in (1, 16, 100, 512, 5000):
                blocks = pairs.code_blocks(rows, pair, generation)
                assert blocks.rows <= rows and blocks.rows % 32 == 0 or blocks.rows == rows
                assert blocks.n % 128 == 0 and k % blocks.k == 0
                assert blocks.k == k or not pair.grouped or blocks.k % pair.group == 0
                held = blocks.rows * k * (pair.left.itemsize + 8) + 2 * blocks.k * blocks.n
                assert held <= (blocks.vmem or 16 * 2**20)
    long = dataclasses.replace(pair, k=2**20 + 1)
    assert "no blocks along 1048577 fit" in pairs.code_blocks(64, long, 5)


def test_gradients_are_refused_as_where_activations_are_rounded_before():
    w, scheme = _weight("w8a8"), SCHEMES["int8 channel"]
    message = r"quantizes activations \(int8 channel\).*no useful gradient.*mode simulate"
    with pytest.raises(TypeError, match=message):
        jax.grad(lambda x: _inside(x, w, scheme).sum())(normal(5, 384))


@pytest.mark.parametrize("inside", [True, False])
def test_the_gradient_in_scales_is_that_of_xla(inside: bool):
    w, scheme, x = _weight("w8a8"), SCHEMES["int8 channel"], normal(5, 384)

    def loss(scale, backend):
        held = dataclasses.replace(w, scale=scale)
        if inside:
            y = dot_general(x, held, ROWS, activations=scheme, backend=backend)
        else:
            y = dot_general(quantize_array(x, scheme), held, ROWS, backend=backend)
        return (y * y).sum()

    got, expected = (jax.grad(loss)(w.scale, backend) for backend in ("mosaic_tpu", "xla"))
    # Sums over 5 rows of products of what is equal to 2 ulp.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2.0**-20 * float(abs(expected).max()))


@pytest.mark.parametrize("name", ["w8a8", "fp8 blocks"])
def test_it_is_mapped_and_scanned(name: str):
    scheme, xs = SIDES[name][0], normal(3, 9, 384, seed=3)
    weights = [
        quantize_array(uneven(384, 200, seed=i), SIDES[name][1], contracted=(0,)) for i in range(3)
    ]
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *weights)
    mapped = jax.vmap(lambda x, w: _inside(x, w, scheme))(xs, stack)
    _, scanned = jax.lax.scan(lambda c, xw: (c, _inside(*xw, scheme)), None, (xs, stack))
    shared = jax.vmap(lambda x: _inside(x, weights[0], scheme))(xs)
    for i in range(3):
        assert same_bits(mapped[i], _inside(xs[i], weights[i], scheme))
        assert same_bits(shared[i], _inside(xs[i], weights[0], scheme))
    assert same_bits(scanned, mapped)


@pytest.mark.parametrize("name", ["w8a8", "fp8 blocks"])
def test_a_layer_of_a_stack_is_read_where_it_lies(name: str):
    """No copy of its codes is taken out: the kernel is given the whole stack."""
    scheme, x = SIDES[name][0], normal(9, 384, seed=3)
    weights = [
        quantize_array(uneven(384, 200, seed=i), SIDES[name][1], contracted=(0,)) for i in range(3)
    ]
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *weights)

    def layer(x, stack, i):
        w = jax.tree.map(lambda leaf: leaf[i], stack)
        return _inside(x, w, scheme, layer=Layer(stack=stack, index=i))

    for i, w in enumerate(weights):
        assert same_bits(jax.jit(layer)(x, stack, jnp.int32(i)), _inside(x, w, scheme))
    # What was taken out is not looked at.
    zeros = dataclasses.replace(weights[1], codes=jnp.zeros_like(weights[1].codes))
    got = _inside(x, zeros, scheme, layer=Layer(stack=stack, index=jnp.int32(1)))
    assert same_bits(got, _inside(x, weights[1], scheme))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "x")], ids=["rows", "contracted", "outputs"])
@pytest.mark.parametrize("name", ["w8a8", "fp8 blocks"])
def test_four_devices_compute_the_same(name: str, spec: P, inside: bool):
    case = Case(((8, 512), (512, 1024)), ((1,), (0,)))
    scheme, x = SIDES[name][0], normal(8, 512, seed=3)
    q = quantize_array(x, scheme)
    w = quantize_array(uneven(512, 1024), SIDES[name][1], contracted=(0,))
    sharding = NamedSharding(MESH, spec)

    @jax.jit
    def run(x, w):
        if inside:
            return _inside(x, w, scheme, sharding=sharding)
        q = quantize_activation(x, scheme, contracted=(1,))
        return dot_general(q, w, ROWS, sharding=sharding, backend="mosaic_tpu")

    placed = place(w, sharding)
    moved = np.abs(np.asarray(run(x, placed)) - product(case, q, w))
    assert (moved <= bound(case, q, w, halves=False)).all()
    text = run.lower(x, placed).compile().as_text()
    # Weights stay where they are: no array of bytes is gathered.
    assert not re.search(r"(s8|f8e4m3fn)\[[\d,]*\]\S* all-gather", text)


@pytest.mark.parametrize("n", [100, 200, 256, 1000, 2000])
@pytest.mark.parametrize("kept", [128, 256, None])
def test_scales_of_blocks_are_those_of_their_columns(n: int, kept: int | None):
    """`kept` columns share one; blocks of columns in the kernel need not be as wide."""
    scheme = Scheme(values=E4M3, tile=Tile(contracted=128, kept=kept, ragged=True))
    w, x = quantize_array(uneven(384, n), scheme, contracted=(0,)), normal(3, 384)
    case = Case(((3, 384), (384, n)), ((1,), (0,)))
    q = quantize_array(x, SIDES["fp8 blocks"][0])
    moved = np.abs(np.asarray(_inside(x, w, SIDES["fp8 blocks"][0])) - product(case, q, w))
    assert (moved <= bound(case, q, w, halves=False)).all()


def test_rows_that_lie_on_several_devices_are_rounded_before():
    call = _call("w8a8", sharding=NamedSharding(MESH, P("x")))
    assert "the rows lie on several devices" in pairs.refuses_rounding(call)
    assert pairs.refuses_rounding(_call("w8a8", sharding=NamedSharding(MESH, P(None, "x")))) is None


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v4", "v5e", "v5p", "v6e", "7x"])
@every_pair
def test_it_compiles_and_reads_the_weight_once(name: str, target: str):
    scheme = SIDES[name][0]
    x = jax.ShapeDtypeStruct((16, 1000 if name == "w8a8" else 1024), jnp.bfloat16)
    w = abstract_qarray((x.shape[1], 1024), jnp.bfloat16, SIDES[name][1], contracted=(0,))

    def run(x, w):
        return dot_general(x, w, ROWS, activations=scheme, backend="mosaic_tpu")

    compiled = compile_for(run, (x, w), TARGETS[target])
    kernels = [step.kernel for step in compiled.scheduled().steps if step.kernel]
    assert kernels == ["jaxquant_codes_product"]
    least = w.nbytes + 2 * 16 * (x.shape[1] + 1024)
    assert compiled.hlo.bytes_moved <= 1.05 * least


def test_the_plan_sees_the_kernel_or_why_not():
    name, reasons = choose_backend(_call("w8a8", rows=16))
    assert name == "mosaic_tpu" and reasons == {}
    name, reasons = choose_backend(_call("w8a8", rows=16, kind="TPU v4"))
    assert name == "xla"
    assert "INT8 is scheduled to win up to 1 rows, and there are 16" in reasons["mosaic_tpu"]
    assert choose_backend(_call("w8a8", rows=1, kind="TPU v4"))[0] == "mosaic_tpu"
