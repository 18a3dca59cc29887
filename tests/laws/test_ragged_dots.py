"""Every backend of the ragged product computes what the codes stand for.

A new backend or scheme is one row of `BACKENDS` or `SCHEMES`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from quantized import centered, codes_of, layouts, normal, SCHEMES, uneven, values

from jaxquant.ops import ragged_dot, Refusal
from jaxquant.ops._factors import refuses_codes
from jaxquant.ops.ragged_dot import BACKENDS
from jaxquant.qarray import Layout, place, QArray, quantize_array, relayout

pytestmark = pytest.mark.tables

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_scheme = pytest.mark.parametrize("name", SCHEMES)
M, K, N, E = 12, 256, 128, 3
# An expert without rows, all rows to one, and rows beyond the last group.
SIZES = {"even": (4, 4, 4), "empty": (5, 0, 7), "one": (0, 12, 0), "beyond": (2, 3, 1)}
BEYOND = SIZES["beyond"]


def rows(dtype=jnp.float32) -> jax.Array:
    return normal(M, K, seed=1, dtype=dtype)


def experts(name: str) -> QArray:
    return codes_of(SCHEMES[name], E, K, N, contracted=(1,), stack=(0,))


def exact(x) -> np.ndarray:
    return values(x) if isinstance(x, QArray) else np.asarray(x).astype(np.float64)


def product(lhs: np.ndarray, rhs: np.ndarray, sizes) -> np.ndarray:
    """Row by row, in the dtype of the operands."""
    out = np.zeros((lhs.shape[0], rhs.shape[2]), lhs.dtype)
    for row, expert in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[row] = lhs[row] @ rhs[expert]
    return out


def bound(lhs, rhs, sizes, halves: bool = False) -> np.ndarray:
    """`K` roundings of sums in float32 and a few of scales; in bfloat16, one of each factor too."""
    magnitude = product(np.abs(exact(lhs)), np.abs(exact(rhs)), sizes)
    return ((K + 8) * 2.0**-24 + (2.0**-7 if halves else 0)) * magnitude


def _run(backend: str, lhs, rhs, sizes) -> jax.Array:
    def run(lhs, rhs, sizes):
        return ragged_dot(lhs, rhs, sizes, backend=backend)

    return jax.jit(run)(lhs, rhs, jnp.asarray(sizes, jnp.int32))


def _check(backend: str, lhs, rhs, sizes) -> None:
    got = _run(backend, lhs, rhs, sizes)
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    assert (got.shape, got.dtype) == ((M, N), dtype)
    moved = np.abs(exact(got) - product(exact(lhs), exact(rhs), sizes))
    assert (moved <= bound(lhs, rhs, sizes, halves=dtype == jnp.bfloat16)).all()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("activations", [None, "int8 channel"])
@every_backend
def test_rows_go_to_their_experts_and_those_beyond_give_zeros(backend, activations, sizes):
    x = rows() if activations is None else quantize_array(rows(), SCHEMES[activations])
    _check(backend, x, experts("int8 channel"), sizes)


@every_scheme
def test_every_scheme_of_experts(name: str):
    _check("xla", rows(), experts(name), BEYOND)


@every_scheme
def test_every_scheme_of_rows(name: str):
    """What the integer product cannot hold is refused, and left to the reference."""
    scheme = SCHEMES[name]
    if scheme.tile.kept not in (1, None) and not scheme.tile.ragged:
        pytest.skip("a block of 128 rows")
    weight = experts("int4 g32 bfloat16" if scheme.values.integer else "e4m3 g64 bfloat16")
    x = quantize_array(rows(), scheme)
    reason = refuses_codes(x, weight)
    if reason is not None:
        assert scheme.zero_point is not None or centered(scheme)
        with pytest.raises(Refusal, match="does not fit int8|centered"):
            ragged_dot(x, weight, jnp.asarray(BEYOND), backend="xla")
    _check("xla" if reason is None else "reference", x, weight, BEYOND)


@pytest.mark.parametrize("weight", ["int8 channel", "int4 channel", "int8 tensor"])
@pytest.mark.parametrize("activations", ["int8 channel", "int8 tensor"])
def test_integers_are_summed_exactly(activations: str, weight: str):
    """What is left are the rounding of the sum to float32, and two products with scales."""
    x, w = quantize_array(rows(), SCHEMES[activations]), experts(weight)
    sums = product(*(np.asarray(q.codes).astype(np.int64) for q in (x, w)), BEYOND)
    left = np.broadcast_to(np.asarray(x.scale, np.float64), (M, 1))
    right = np.broadcast_to(np.asarray(w.scale, np.float64), (E, 1, N))
    expected = sums * product(left, right, BEYOND)
    got = _run("xla", x, w, BEYOND)
    assert (np.abs(got - expected) <= 2 * np.spacing(np.abs(expected).astype(np.float32))).all()


@pytest.mark.parametrize(
    "activations, weight",
    [
        ("e4m3 g64 bfloat16", "nf4"),
        ("mxfp8", "mxfp4"),
        ("e5m2 tensor", "nvfp4"),
        ("int8 middle g32", "int6 ragged g100"),
        ("int6 ragged g100", "int8 channel"),
    ],
)
@every_backend
def test_groups_of_the_sides_may_differ(backend: str, activations: str, weight: str):
    _check(backend, quantize_array(rows(), SCHEMES[activations]), experts(weight), BEYOND)


@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64", "e4m3 block", "nf4", "nvfp4"])
@every_backend
def test_a_model_in_bfloat16(backend: str, name: str):
    w = quantize_array(
        uneven(E, K, N, dtype=jnp.bfloat16), SCHEMES[name], contracted=(1,), stack=(0,)
    )
    _check(backend, rows(jnp.bfloat16), w, BEYOND)


@every_backend
def test_the_rows_alone_may_be_quantized(backend: str):
    w = uneven(E, K, N)
    for name in ("int8 channel", "int4 zero g64"):
        _check(backend, quantize_array(rows(), SCHEMES[name]), w, BEYOND)


LAYOUTS = [
    *layouts(SCHEMES["int4 channel"], first=K, last=N),
    Layout(order=(-2, -3, -1)),
    Layout(order=(-1, -3, -2)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@every_backend
def test_stored_orders_do_not_show(backend: str, layout: Layout):
    x, w = quantize_array(rows(), SCHEMES["int8 channel"]), experts("int4 channel")
    np.testing.assert_array_equal(
        _run(backend, x, relayout(w, layout), BEYOND), _run(backend, x, w, BEYOND)
    )


@pytest.mark.parametrize("activations", [None, "int8 channel", "int8 middle g32"])
@every_backend
def test_a_row_with_nan_is_nan_unless_it_goes_to_no_expert(backend: str, activations: str | None):
    x = rows().at[jnp.asarray([3, 9]), 17].set(jnp.nan)
    x = x if activations is None else quantize_array(x, SCHEMES[activations])
    got = np.asarray(_run(backend, x, experts("int8 channel"), BEYOND))
    lost = np.zeros((M, N), bool)
    lost[3] = True
    np.testing.assert_array_equal(np.isnan(got), lost)
    assert (got[sum(BEYOND) :] == 0).all()


@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64", "e4m3 channel"])
@every_backend
def test_the_gradient_in_the_rows_is_that_of_the_linear_map(backend: str, name: str):
    w, outer, sizes = experts(name), normal(M, N, seed=5), jnp.asarray(BEYOND, jnp.int32)

    def loss(x, w):
        return (outer * ragged_dot(x, w, sizes, backend=backend)).sum()

    got = jax.jit(jax.grad(loss))(rows(), w)
    turned = values(w).swapaxes(1, 2)
    allowed = (N + 8) * 2.0**-24 * product(np.abs(exact(outer)), np.abs(turned), BEYOND)
    assert (np.abs(got - product(exact(outer), turned, BEYOND)) <= allowed).all()


def test_vmap_over_rows_experts_and_sizes_is_a_loop():
    parts = [
        codes_of(SCHEMES["int8 channel"], E, K, N, contracted=(1,), stack=(0,), seed=i)
        for i in range(2)
    ]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    xs = normal(2, M, K, seed=3)
    sizes = jnp.asarray([SIZES["even"], BEYOND], jnp.int32)
    got = jax.jit(jax.vmap(ragged_dot))(xs, stack, sizes)
    for i, w in enumerate(parts):
        moved = np.abs(got[i] - product(exact(xs[i]), values(w), np.asarray(sizes[i])))
        assert (moved <= bound(xs[i], w, np.asarray(sizes[i]))).all()


def test_outputs_may_be_spread_over_devices():
    mesh = Mesh(np.asarray(jax.devices()), ("x",))
    w = experts("int8 channel")
    spread = place(w, NamedSharding(mesh, P(None, None, "x")))
    moved = np.abs(_run("xla", rows(), spread, BEYOND) - product(exact(rows()), exact(w), BEYOND))
    assert (moved <= bound(rows(), w, BEYOND)).all()
