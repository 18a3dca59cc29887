"""Every backend of the convolution computes what the codes stand for.

A new backend, case or scheme is one row of `BACKENDS`, `CASES` or `SCHEMES`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolutions import bound, Case, CASES, convolution, exact, NHWC, operands, plain
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from quantized import codes_of, layouts, normal, SCHEMES, values

from jaxquant.numerics import AbsMax, AbsMean, E2M1, Format, INT5, NF4, TERNARY
from jaxquant.ops import conv_general_dilated, Refusal
from jaxquant.ops.conv import BACKENDS
from jaxquant.qarray import Layout, PER_CHANNEL, PER_TENSOR, quantize_array, relayout, Scheme

pytestmark = pytest.mark.tables

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_scheme = pytest.mark.parametrize("name", SCHEMES)
# Blocks of 128 outputs, and groups of up to 128 input features.
WIDE = Case(shapes=((2, 4, 4, 128), (2, 2, 128, 128)), letters=NHWC, strides=(1, 1))


def _run(backend: str, case: Case, sides: list) -> jax.Array:
    def run(lhs, rhs):
        return conv_general_dilated(lhs, rhs, **case.settings, backend=backend)

    return jax.jit(run)(*sides)


def _check(backend: str, case: Case, sides: list) -> np.ndarray:
    got = _run(backend, case, sides)
    expected = convolution(case, *map(exact, sides))
    dtype = jnp.promote_types(sides[0].dtype, sides[1].dtype)
    assert (got.shape, got.dtype) == (expected.shape, dtype)
    moved = np.abs(np.asarray(got).astype(np.float64) - expected)
    allowed = bound(case, *sides, halves=dtype == jnp.bfloat16)
    assert (moved <= allowed).all(), (moved / allowed).max()
    return np.asarray(got)


@every_case
def test_the_definition_of_these_tests_is_what_lax_computes(case: Case):
    sides = [plain(case, 0), plain(case, 1)]
    got = jax.lax.conv_general_dilated(*sides, **case.settings)
    assert (np.abs(got - convolution(case, *map(exact, sides))) <= bound(case, *sides)).all()


@pytest.mark.parametrize("name", ["int8 channel", "int8 zero channel", "e5m2 tensor"])
@every_case
def test_a_quantized_kernel_by_plain_images(case: Case, name: str):
    """... on codes; the reference meets these cases in tests/ops/conv/test_reference.py."""
    _check("xla", case, operands(case, None, name))


@every_scheme
def test_every_scheme_of_a_kernel(name: str):
    _check("xla", WIDE, operands(WIDE, None, name))


@pytest.mark.parametrize("name", ["nf4", "nf4 double", "mxfp4", "nvfp4", "e4m3 ragged block"])
@every_backend
def test_kernels_held_in_other_ways_in_a_model_in_bfloat16(backend: str, name: str):
    _check(backend, WIDE, operands(WIDE, None, name, jnp.bfloat16))


# One scale an output of values that bfloat16 does not hold, and of values that it does.
PER_OUTPUT = {
    f: Scheme(values=f, tile=PER_CHANNEL, range=AbsMean() if f is TERNARY else AbsMax())
    for f in (NF4, E2M1, TERNARY, INT5)
}


@pytest.mark.parametrize(
    "name, format",
    [
        ("e4m3 channel", NF4),
        ("e5m2 tensor", E2M1),
        ("int8 channel", TERNARY),
        ("int4 channel", INT5),
        (None, NF4),
    ],
    ids=str,
)
@every_backend
def test_other_formats_of_a_kernel_by_quantized_images(backend: str, name: str, format: Format):
    x = operands(WIDE, name, None)[0]
    w = quantize_array(plain(WIDE, 1), PER_OUTPUT[format], contracted=WIDE.summed(1))
    _check(backend, WIDE, [x, w])


@every_scheme
def test_every_scheme_of_images(name: str):
    """Those that give several scales to one output are refused, and left to the reference."""
    scheme = SCHEMES[name]
    if scheme.tile.kept not in (1, None) and not scheme.tile.ragged:
        pytest.skip("a block of 128 images")
    sides = operands(WIDE, name, "int4 channel" if scheme.values.integer else "e4m3 channel")
    if scheme.tile in (PER_CHANNEL, PER_TENSOR) and scheme.zero_point is None:
        _check("xla", WIDE, sides)
        return
    with pytest.raises(Refusal, match="several scales|does not fit int8|centered"):
        conv_general_dilated(*sides, **WIDE.settings, backend="xla")
    _check("reference", WIDE, sides)


@every_case
def test_integers_are_summed_exactly(case: Case):
    """What is left are the rounding of the sum to float32, and two products with scales."""
    x, w = operands(case, "int8 channel", "int8 channel")
    got = _run("xla", case, [x, w])
    sums = convolution(case, *(np.asarray(q.codes).astype(np.int64) for q in (x, w)))
    ones = [np.ones(q.shape) for q in (x, w)]
    # Scales are the same all along what is summed, so that means over windows tell them apart.
    scale = [values(q) / np.where(np.asarray(q.codes) == 0, 1, np.asarray(q.codes)) for q in (x, w)]
    peak = [np.abs(s).max(axis=case.summed(side), keepdims=True) for side, s in enumerate(scale)]
    spread = [np.broadcast_to(p, q.shape) for p, q in zip(peak, (x, w), strict=True)]
    factor = convolution(case, *spread) / convolution(case, *ones)
    expected = sums * factor
    assert (np.abs(got - expected) <= 2 * np.spacing(np.abs(expected).astype(np.float32))).all()


@pytest.mark.parametrize("pair", [("e4m3 channel", "e5m2 tensor"), ("int8 tensor", "int4 channel")])
@pytest.mark.parametrize("case", [CASES["2-D"], CASES["batch groups"]], ids=str)
@every_backend
def test_formats_of_the_sides_may_differ(backend: str, case: Case, pair: tuple[str, str]):
    _check(backend, case, operands(case, *pair))


@every_backend
def test_the_images_alone_may_be_quantized(backend: str):
    for name in ("int8 channel", "int4 zero g64"):
        _check(backend, WIDE, operands(WIDE, name, None))


@pytest.mark.parametrize("activations", [None, "int8 channel"])
@every_backend
def test_a_model_in_bfloat16(backend: str, activations: str | None):
    _check(backend, WIDE, operands(WIDE, activations, "int8 channel", jnp.bfloat16))


LAYOUTS = [*layouts(SCHEMES["int4 channel"], first=128, last=128), Layout(order=(-1, -4, -3, -2))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@every_backend
def test_stored_orders_do_not_show(backend: str, layout: Layout):
    x, w = operands(WIDE, "int8 channel", "int4 channel")
    np.testing.assert_array_equal(
        _run(backend, WIDE, [x, relayout(w, layout)]), _run(backend, WIDE, [x, w])
    )


@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64", "e4m3 channel"])
@every_backend
def test_the_gradient_in_the_images_is_that_of_the_linear_map(backend: str, name: str):
    case = Case(shapes=((2, 3, 4, 64), (2, 2, 64, 3)), letters=NHWC, strides=(2, 1))
    x, w = operands(case, None, name)
    n = x[0].size
    basis = np.eye(n).reshape(n, *x.shape[1:])
    each = convolution(case, basis, values(w))
    outer = normal(2, *each.shape[1:], seed=5)

    def loss(x, w):
        return (outer * conv_general_dilated(x, w, **case.settings, backend=backend)).sum()

    got = np.asarray(jax.jit(jax.grad(loss))(x, w)).reshape(2, n)
    o = np.asarray(outer).astype(np.float64)
    expected = np.einsum("nhwo,bhwo->bn", each, o)
    magnitude = np.einsum("nhwo,bhwo->bn", np.abs(each), np.abs(o))
    # An input reaches at most 4 windows of 3 outputs.
    assert (np.abs(got - expected) <= (12 + 8) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64"])
def test_vmap_over_images_and_over_kernels_is_a_loop(name: str):
    case = Case(shapes=((2, 4, 4, 64), (2, 2, 64, 8)), letters=NHWC, strides=(1, 1))
    kernels = [codes_of(SCHEMES[name], 2, 2, 64, 8, contracted=(0, 1, 2), seed=i) for i in range(3)]
    images = [normal(*case.shapes[0], seed=10 + i) for i in range(3)]
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *kernels)

    def run(x, w):
        return conv_general_dilated(x, w, **case.settings)

    for xs, ws, axes in (
        (images, [kernels[0]] * 3, (0, None)),
        ([images[0]] * 3, kernels, (None, 0)),
        (images, kernels, (0, 0)),
    ):
        args = (jnp.stack(xs) if axes[0] == 0 else xs[0], stack if axes[1] == 0 else ws[0])
        got = jax.jit(jax.vmap(run, in_axes=axes))(*args)
        for i, (x, w) in enumerate(zip(xs, ws, strict=True)):
            expected = convolution(case, exact(x), values(w))
            assert (np.abs(got[i] - expected) <= bound(case, x, w)).all()


@pytest.mark.parametrize("activations", [None, "int8 channel"])
def test_images_may_be_spread_over_devices(activations: str | None):
    case = Case(shapes=((8, 4, 4, 16), (3, 3, 16, 8)), letters=NHWC, strides=(1, 1))
    x, w = operands(case, activations, "int8 channel")
    mesh = Mesh(np.asarray(jax.devices()), ("x",))
    # Scales of images follow the images: one for each.
    spread = jax.device_put(x, NamedSharding(mesh, P("x")))
    got = _run("xla", case, [spread, w])
    assert got.sharding.spec[0] == "x"
    assert (
        np.abs(np.asarray(got) - convolution(case, exact(x), values(w))) <= bound(case, x, w)
    ).all()
