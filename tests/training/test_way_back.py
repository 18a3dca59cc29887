"""Each recipe's three products against what its definition multiplies, exactly, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant.numerics import E4M3, E5M2
from jaxquant.ops import dot_general
from jaxquant.qarray import PER_CHANNEL, PER_TENSOR, quantize_array, Scheme, schemes, Tile
from jaxquant.recipes import NAMED
from jaxquant.training import Dot, in_codes, WayBack

NAMES = [f"fp8_train_{kind}" for kind in ("delayed", "current", "row", "block", "mx")]
SHAPES = {"even": ((2, 64), 256, 128), "ragged": ((3, 48), 192, 136)}
ENDS = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}
GAMMA = 2.0**-24


def rule(name):
    return NAMED[name].rules[-1]


def held(x, format, tile, power_of_two=False, scale=None):
    """What codes of a matrix stand for, summed along its first axis, by the words of the papers."""
    dtype, end = ENDS[format]
    x = np.asarray(x, np.float32)
    result = np.zeros(x.shape, np.float64)
    k, n = (size or full for size, full in zip(tile, x.shape, strict=True))
    for i in range(0, x.shape[0], k):
        for j in range(0, x.shape[1], n):
            box = x[i : i + k, j : j + n]
            peak = np.abs(box).max()
            if scale is not None:
                s = np.float32(scale)
            elif power_of_two:
                s = np.float32(2.0 ** (np.floor(np.log2(peak)) - np.floor(np.log2(end))))
            else:
                s = peak * np.float32(1 / end)
            codes = np.clip(box * (np.float32(1) / s), -end, end).astype(dtype)
            result[i : i + k, j : j + n] = codes.astype(np.float64) * np.float64(s)
    return result


TILES = {
    # Of inputs and gradients, and of weights: along what is summed, along what is kept.
    "fp8_train_delayed": ((None, None), (None, None), "e5m2"),
    "fp8_train_current": ((None, None), (None, None), "e5m2"),
    "fp8_train_row": ((None, 1), (None, 1), "e4m3"),
    "fp8_train_block": ((128, 1), (128, 128), "e4m3"),
    "fp8_train_mx": ((32, 1), (32, 1), "e4m3"),
}


def operands(shape):
    """With a range wide enough for tiles to matter: 2^12 between columns and between rows."""
    rows, k, n = SHAPES[shape]
    keys = jax.random.split(jax.random.key(7), 6)

    def one(i, size):
        last = (*(1 for _ in size[1:]), size[-1])
        wide = jnp.exp2(jax.random.uniform(keys[i + 3], last, minval=-6, maxval=6))
        return jax.random.normal(keys[i], size) * wide

    return one(0, (*rows, k)), one(1, (k, n)), one(2, (*rows, n))


def products(name, x, w, g, scale=None):
    own = rule(name)
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    back = own.training.way_back
    back = back if scale is not None else dataclasses.replace(back, scaling=None)
    dot = Dot(
        numbers=numbers,
        shapes=(x.shape, w.shape),
        dtypes=(x.dtype, w.dtype),
        schemes=(own.activations, own.weights),
        inputs=0,
        back=back,
    )

    def forward(x, w):
        q = (
            quantize_array(x, own.activations, contracted=(x.ndim - 1,)),
            quantize_array(w, own.weights, contracted=(0,)),
        )
        q = jax.tree.map(jax.lax.stop_gradient, q)
        return in_codes(lambda held: dot_general(*held, numbers), dot, (x, w), q, scale)

    y, pull = jax.vjp(forward, x, w)
    return (y, *pull(g))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_three_products_are_those_of_the_definition(name, shape):
    x, w, g = operands(shape)
    tile, square, gradients = TILES[name]
    mx = name == "fp8_train_mx"
    flat = np.asarray(x).reshape(-1, x.shape[-1])
    over = np.asarray(g).reshape(-1, g.shape[-1])
    first = held(flat.T, "e4m3", tile, mx)
    again = first.T if name == "fp8_train_block" else flat
    pairs = {
        "y": (first.T, held(w, "e4m3", square, mx)),
        "dx": (held(over.T, gradients, tile, mx).T, held(w.T, "e4m3", square, mx)),
        "dw": (held(again, "e4m3", tile, mx).T, held(over, gradients, tile, mx)),
    }
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda x, w, g: products(name, x, w, g))(x, w, g)
    for (what, (left, right)), y in zip(pairs.items(), found, strict=True):
        exact = left @ right
        # Sums in float32, in any order, of products that are scaled in float32.
        bound = (left.shape[1] + 6) * GAMMA * (abs(left) @ abs(right))
        error = abs(np.asarray(y, np.float64).reshape(exact.shape) - exact)
        assert (error <= bound).all(), (what, (error / bound).max())


def test_a_known_scale_is_that_of_the_gradient():
    x, w, g = operands("even")
    scale = jnp.array([2.0**-9], jnp.float32)
    _, dx, dw = products("fp8_train_delayed", x, w, g, scale)
    over = held(np.asarray(g).reshape(-1, g.shape[-1]).T, "e5m2", (None, None), scale=2.0**-9).T
    assert np.abs(over).max() == 57344 * 2.0**-9  # So that some are clipped.
    weight = held(w, "e4m3", (None, None))
    bound = (w.shape[1] + 6) * GAMMA * (abs(over) @ abs(weight.T))
    assert (
        abs(np.asarray(dx, np.float64).reshape(-1, w.shape[0]) - over @ weight.T) <= bound
    ).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_of_inputs_is_codes(name):
    x, w, _ = operands("even")
    own = rule(name)
    numbers = (((2,), (0,)), ((), ()))
    dot = Dot(
        numbers=numbers,
        shapes=(x.shape, w.shape),
        dtypes=(x.dtype, w.dtype),
        schemes=(own.activations, own.weights),
        inputs=0,
        back=own.training.way_back,
    )
    q = (
        quantize_array(x, own.activations, contracted=(2,)),
        quantize_array(w, own.weights, contracted=(0,)),
    )
    _, pull = jax.vjp(lambda x: in_codes(lambda h: dot_general(*h, numbers), dot, (x, w), q), x)
    kept = {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(pull)}
    rows = (x.shape[0] * x.shape[1], x.shape[2])
    assert (rows, "float8_e4m3fn") in kept
    assert not {(rows, "float32"), (x.shape, "float32")} & kept


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_axes_may_lie_anyhow(turned, batched):
    """Sides exchanged, weights stored outputs first, batched axes: the gradients of the product."""
    own = rule("fp8_train_row")
    keys = jax.random.split(jax.random.key(3), 3)
    lead = (4,) if batched else ()
    x, w = (
        jax.random.normal(keys[0], (*lead, 6, 8, 5)),
        jax.random.normal(keys[1], (*lead, 7, 8, 5)),
    )
    at = len(lead)
    sums, batch = (at + 1, at + 2), tuple(range(at))
    numbers = ((sums, sums), (batch, batch))
    sides = (w, x) if turned else (x, w)
    # One scale a row holds signs, but for the rounding of the scale.
    sides = tuple(jnp.sign(s) for s in sides)
    dot = Dot(
        numbers=numbers,
        shapes=(sides[0].shape, sides[1].shape),
        dtypes=(x.dtype, w.dtype),
        schemes=(own.activations, own.weights),
        inputs=int(turned),
        back=own.training.way_back,
    )
    g = jnp.sign(jax.random.normal(keys[2], jax.lax.dot_general(*sides, numbers).shape))

    def forward(a, b):
        q = tuple(quantize_array(s, own.weights, contracted=sums, stack=batch) for s in (a, b))
        return in_codes(lambda held: dot_general(*held, numbers), dot, (a, b), q)

    gradients = jax.jit(lambda a, b: jax.vjp(forward, a, b)[1](g))(*sides)
    _, wanted = jax.vjp(lambda a, b: jax.lax.dot_general(a, b, numbers), *sides)
    for found, exact in zip(gradients, wanted(g), strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_a_wide_range_is_held_in_blocks_and_lost_in_one_scale():
    """A tensor whose rows differ by 2^20: its small rows vanish under one scale."""
    x, w, g = operands("even")
    x = x.at[0].multiply(2.0**-20)
    small = np.asarray(x[0], np.float64) @ np.asarray(w, np.float64)
    lost = {}
    for name in ("fp8_train_current", "fp8_train_row", "fp8_train_block", "fp8_train_mx"):
        y, _, _ = jax.jit(functools.partial(products, name))(x, w, g)
        lost[name] = np.linalg.norm(np.asarray(y[0]) - small) / np.linalg.norm(small)
    assert lost["fp8_train_current"] > 0.5
    assert max(lost[name] for name in lost if name != "fp8_train_current") < 0.1


@pytest.mark.parametrize(
    ("back", "weights", "activations", "said"),
    [
        (WayBack(gradients=schemes.MXFP8_E4M3), PER_CHANNEL, None, "both sides"),
        (WayBack(gradients=schemes.INT8_CHANNEL), PER_CHANNEL, PER_CHANNEL, "one kind"),
    ],
)
def test_what_does_not_fit_is_told(back, weights, activations, said):
    e4m3 = Scheme(values=E4M3, tile=weights)
    other = None if activations is None else Scheme(values=E5M2, tile=activations)
    assert said in back.check(e4m3, other)


def test_delayed_gradients_have_one_scale():
    from jaxquant.training import Delayed

    back = WayBack(gradients=Scheme(values=E5M2, tile=Tile(contracted=128)), scaling=Delayed())
    e4m3 = Scheme(values=E4M3, tile=PER_TENSOR)
    assert "PER_TENSOR" in back.check(e4m3, e4m3)
