"""Every backend of the dot computes what the codes stand for: forward.

A new backend, case of dimension numbers or scheme is one row of `BACKENDS`, `CASES` or `SCHEMES`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import (
    bound,
    Case,
    CASES,
    codes,
    operands,
    plain,
    product,
    product_of_sums,
    run_or_skip,
    stored_for,
)
from quantized import layouts, SCHEMES

from jaxquant.numerics import INT8
from jaxquant.ops import BACKENDS, choose_backend, dot, dot_general
from jaxquant.ops.dot._api import KERNELS, make_call
from jaxquant.qarray import CANONICAL, Layout, quantize_array, relayout, Scheme, Tile

pytestmark = pytest.mark.tables

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_scheme = pytest.mark.parametrize("name", SCHEMES)
SQUARE = Case(((8, 256), (256, 256)), ((1,), (0,)))


def _run(backend: str, case: Case, sides: list, layout: Layout | None = None) -> jax.Array:
    sides = list(sides)
    w = sides[case.weight]
    sides[case.weight] = stored_for(backend, case, w) if layout is None else relayout(w, layout)
    return jax.jit(lambda a, b: run_or_skip(backend, a, b, case.numbers))(*sides)


def _check(backend: str, case: Case, sides: list, layout: Layout | None = None) -> np.ndarray:
    got = _run(backend, case, sides, layout)
    expected = product(case, *sides)
    dtype = jnp.promote_types(sides[0].dtype, sides[1].dtype)
    assert (got.shape, got.dtype) == (expected.shape, dtype)
    moved = np.abs(np.asarray(got).astype(np.float64) - expected)
    allowed = bound(case, *sides, halves=dtype == jnp.bfloat16)
    assert (moved <= allowed).all(), (moved / allowed).max()
    return np.asarray(got)


@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64"])
@every_case
@every_backend
def test_a_quantized_weight_by_plain_activations(backend: str, case: Case, name: str):
    _check(backend, case, operands(case, None, name))


PAIRS = [("int8 channel", "int8 channel"), ("e4m3 channel", "e4m3 g64 bfloat16")]


@pytest.mark.parametrize("activations, weight", PAIRS)
@every_case
@every_backend
def test_quantized_activations_by_a_quantized_weight(
    backend: str, case: Case, activations: str, weight: str
):
    sides = operands(case, activations, weight)
    got = _check(backend, case, sides)
    if weight == "int8 channel" and backend != "reference":  # which sums in float32
        _within_2_ulp(got, product_of_sums(case, *sides))


def _within_2_ulp(got: np.ndarray, expected: np.ndarray):
    """The sum is exact; its rounding to float32 and two products with scales cost half an ulp."""
    assert (np.abs(got - expected) <= 2 * np.spacing(np.abs(expected).astype(np.float32))).all()


@pytest.mark.parametrize("case", [SQUARE, CASES["one row"], CASES["batch"]], ids=str)
@every_backend
def test_eight_bits_by_four_are_within_2_ulp_of_exact_sums(backend: str, case: Case):
    if backend == "reference":
        pytest.skip("the reference sums in float32")
    sides = operands(case, "int8 tensor", "int4 channel")
    _within_2_ulp(np.asarray(_run(backend, case, sides)), product_of_sums(case, *sides))


@every_scheme
@every_backend
def test_every_scheme_of_a_weight(backend: str, name: str):
    _check(backend, SQUARE, operands(SQUARE, None, name))


@pytest.mark.parametrize(
    "name",
    ["int8 channel", "int8 zero channel", "int4 zero g64", "e4m3 block", "e5m2 tensor", "nf4"],
)
@every_backend
def test_a_model_in_bfloat16(backend: str, name: str):
    _check(backend, SQUARE, operands(SQUARE, None, name, jnp.bfloat16))


@every_scheme
@every_backend
def test_every_scheme_of_activations(backend: str, name: str):
    case = Case(((256, 256), (256, 24)), ((1,), (0,)))
    other = "int8 channel" if SCHEMES[name].values.integer else "e5m2 tensor"
    _check(backend, case, operands(case, name, other))


@pytest.mark.parametrize(
    "activations, weight",
    [
        ("int8 channel", "e4m3 channel"),
        ("int8 g128 bfloat16", "int4 g32 bfloat16"),
        # Floats and tables, of which some fit bfloat16 and others do not.
        ("mxfp8", "mxfp4"),
        ("e4m3 channel", "nvfp4"),
        ("e4m3 ragged block", "nf4"),
        ("nf4", "fp4"),
        ("mxfp6 e3m2", "binary"),
        # Groups that end raggedly at different places; scales held as codes on both sides.
        ("int6 ragged g100", "int8 middle g32"),
        ("int6 ragged g100", "int6 ragged g100"),
        ("int3 g32", "int2 zero g64"),
        ("nvfp4", "nvfp4"),
        ("nf4 double", "mxfp8"),
    ],
)
@every_backend
def test_formats_and_groups_of_the_sides_may_differ(backend: str, activations: str, weight: str):
    _check(backend, SQUARE, operands(SQUARE, activations, weight))


@every_backend
def test_groups_of_64_and_96_have_32_in_common(backend: str):
    case = Case(((8, 192), (192, 24)), ((1,), (0,)))
    x, w = (
        quantize_array(
            plain(case, side),
            Scheme(values=INT8, tile=Tile(contracted=size)),
            contracted=case.contracted[side],
        )
        for side, size in enumerate((64, 96))
    )
    _check(backend, case, [x, w])


LAYOUTS = [
    pytest.param(name, layout, id=f"{name} {layout}")
    for name in ("int8 channel", "int4 zero g64", "e4m3 block")
    for layout in layouts(SCHEMES[name], first=256, last=256)
] + [
    pytest.param(name, layout, id=f"{name} {layout}")
    for name in ("int3 g32", "nvfp4", "int6 ragged g100")
    for layout in layouts(SCHEMES[name], first=256, last=256)[-2:]
]


@pytest.mark.parametrize("name, layout", LAYOUTS)
@pytest.mark.parametrize("activations", [None, "int8 channel"])
@every_backend
def test_every_layout_of_a_weight(backend: str, activations: str | None, name: str, layout: Layout):
    if activations and not SCHEMES[name].values.integer:
        activations = "e4m3 channel"
    _check(backend, SQUARE, operands(SQUARE, activations, name), layout)


# Stored orders of the axes of a weight (6, 256, 4), and of a stack of them.
ORDERS = {
    "outputs around": [(-1, -3, -2), (-1, -2, -3), (-2, -3, -1), (-3, -1, -2), (-2, -1, -3)],
    "outputs around, on the left": [(-1, -3, -2), (-2, -1, -3)],
    "two batches": [(-1, -2, -4, -3), (-3, -1, -4, -2)],
    "several apart": [(-2, -3, -1), (-2, -1, -3)],
    "batch in the middle": [(-2, -1, -3)],
}


@pytest.mark.parametrize("packed", [False, True], ids=["one code each", "packed"])
@pytest.mark.parametrize(
    "name, order", [(name, order) for name, orders in ORDERS.items() for order in orders]
)
@every_backend
def test_stored_orders_do_not_show(backend: str, name: str, order: tuple, packed: bool):
    case = CASES[name]
    last = case.shapes[case.weight][order[-1]]
    layout = Layout(order=order, packed=last if packed else None)
    _check(backend, case, operands(case, None, "int4 channel"), layout)


@pytest.mark.parametrize("activations", [None, "int8 tensor"])
@every_backend
def test_a_tile_may_hold_several_contracted_axes_in_part(backend: str, activations: str | None):
    case = CASES["several contracted"]
    sides = operands(case, activations, "int8 g128 bfloat16")
    assert sides[1].tile == (2, 64, 1)
    _check(backend, case, sides)


@every_backend
def test_nothing_need_be_summed(backend: str):
    case = Case(((5,), (3, 4)), ((), ()))
    w = quantize_array(plain(case, 1), SCHEMES["int8 channel"], contracted=())
    _check(backend, case, [plain(case, 0), w], CANONICAL)


@every_backend
def test_the_weight_may_stand_for_another_dtype_than_the_activations(backend: str):
    x, q = operands(SQUARE, None, "int8 channel", jnp.bfloat16)
    q = stored_for(backend, SQUARE, q)
    wide = run_or_skip(backend, x.astype(jnp.float32), q, SQUARE.numbers, out_dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    same = run_or_skip(backend, x, q, SQUARE.numbers, out_dtype=jnp.float32)
    np.testing.assert_allclose(same, wide, rtol=0, atol=2**-8 * float(jnp.abs(wide).max()))


@pytest.mark.parametrize(
    "activations, weight",
    [
        (None, "int8 channel"),
        (None, "int4 zero g64"),
        ("int8 channel", "int8 channel"),
        ("e4m3 channel", "e4m3 channel"),
    ],
)
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
@every_backend
def test_a_row_with_nan_is_nan_and_the_others_are_not(backend, run, activations, weight):
    x, w = operands(SQUARE, None, weight)
    w = stored_for(backend, SQUARE, w)

    def product(x, w):
        if activations is not None:
            x = quantize_array(x, SCHEMES[activations])
        return run_or_skip(backend, x, w, SQUARE.numbers)

    lost = np.zeros((8, 256), bool)
    lost[3] = True
    y = run(product)(x.at[3, 17].set(jnp.nan), w)
    np.testing.assert_array_equal(np.isnan(np.asarray(y)), lost)


@every_backend
def test_rows_of_zeros_and_weights_of_zeros_give_zeros(backend: str):
    zeros = quantize_array(jnp.zeros((256, 256)), SCHEMES["int4 zero g64"], contracted=(0,))
    y = np.asarray(_run(backend, SQUARE, [plain(SQUARE, 0), zeros]))
    # A kernel may multiply codes that are too large by up to 24, and take that off the sums.
    rest = 48 * 264 * 2.0**-24 * np.abs(np.asarray(plain(SQUARE, 0))).sum(axis=1, keepdims=True)
    assert (np.abs(y) <= (rest if backend in KERNELS else 0)).all()
    w = codes(SQUARE, 1, "int8 channel")
    assert (np.asarray(_run(backend, SQUARE, [jnp.zeros((8, 256)), w])) == 0).all()


def test_the_backend_that_is_chosen_gives_the_answer():
    x, q = operands(SQUARE, None, "int8 channel")
    name, reasons = choose_backend(make_call(x, q, SQUARE.numbers))
    assert [*reasons, name] == list(BACKENDS)[: len(reasons) + 1]
    chosen, named = dot(x, q), dot_general(x, q, SQUARE.numbers, backend=name)
    np.testing.assert_array_equal(chosen, named)
