"""The law of every rule: where it keeps channels, scaling them scales the result by their factors.

Each function gets an array whose elements have channels along one axis or all, and one that has
none. With factors that are powers of two, alike where channels are tied and one where they are
fixed, `f(x / s, y)` is bit for bit `f(x, y) / s`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.intercept._channel_rules import apply_rule, Operands
from jaxquant.intercept._channels import Book, FREE, free, ZERO

SHAPE = (2, 3, 4)
RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(RNG.normal(size=SHAPE).astype(np.float32)) for _ in range(2))
ROWS = jnp.asarray([[1], [0], [1]], jnp.int32)
INNER = lax.GatherDimensionNumbers(
    offset_dims=(1, 2), collapsed_slice_dims=(0,), start_index_map=(0,)
)
ADDED = lax.ScatterDimensionNumbers(
    update_window_dims=(1, 2), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,)
)


def dot(left, right, contracted, batch=((), ())):
    return lax.dot_general(left, right, (contracted, batch))


def scatter_to_zeros(x, y):
    return lax.scatter_add(lax.full((4, 3, 4), 0.0), ROWS[:2], x, ADDED)


def scatter_to_others(x, y):
    return lax.scatter_add(y, ROWS[:2], x, ADDED)


def update(x, y):
    return lax.dynamic_update_slice(y, x, (0, 0, 0))


# Name: function, and the axes whose channels survive it in part at least (a letter each: `a` all
# axes at once, else the number of the axis along which they vary).
LAWS = {
    "neg": (lambda x, y: lax.neg(x), "012a"),
    "abs": (lambda x, y: lax.abs(x), "012a"),
    "a narrower type": (lambda x, y: lax.convert_element_type(x, jnp.bfloat16), "012a"),
    "an integer": (lambda x, y: lax.convert_element_type(x, jnp.int32), ""),
    "mul": (lambda x, y: lax.mul(y, x), "012a"),
    "square": (lambda x, y: lax.mul(x, x), ""),
    "div": (lambda x, y: lax.div(x, y), "012a"),
    "divisor": (lambda x, y: lax.div(y, x), ""),
    "add of another": (lambda x, y: lax.add(x, y), ""),
    "add of itself": (lambda x, y: lax.sub(lax.mul(x, y), x), "012a"),
    "add of its neighbour": (lambda x, y: lax.add(x, lax.rev(x, (2,))), "01"),
    "max with zero": (lambda x, y: lax.max(x, 0.0), "012a"),
    "max with one": (lambda x, y: lax.max(x, 1.0), ""),
    "exp": (lambda x, y: lax.exp(x), ""),
    "select with zeros": (
        lambda x, y: lax.select(lax.gt(y, 0.0), x, lax.full_like(x, 0.0)),
        "012a",
    ),
    "leaky relu": (lambda x, y: lax.select(lax.ge(x, 0.0), x, lax.mul(x, 0.125)), "012a"),
    "select with others": (lambda x, y: lax.select(lax.gt(y, 0.0), x, y), ""),
    "sign": (lambda x, y: lax.mul(lax.sign(x), lax.abs(x)), "012a"),
    "transpose": (lambda x, y: lax.transpose(x, (2, 0, 1)), "012a"),
    "reshape": (lambda x, y: lax.reshape(x, (4, 6)), "012a"),
    "squeeze": (lambda x, y: lax.squeeze(lax.expand_dims(x, (1,)), (1,)), "012a"),
    "broadcast": (lambda x, y: lax.broadcast_in_dim(x, (2, 5, 3, 4), (0, 2, 3)), "012a"),
    "slice": (lambda x, y: lax.slice(x, (0, 1, 0), (2, 3, 4), (1, 1, 2)), "012a"),
    "split": (lambda x, y: lax.mul(*lax.split(lax.mul(x, y), (2, 2), 2)[:1], 2.0), "012a"),
    "rev": (lambda x, y: lax.rev(x, (1, 2)), "012a"),
    "concatenate": (lambda x, y: lax.concatenate([x, y, x], 1), "012a"),
    "pad": (lambda x, y: lax.pad(x, 0.0, ((0, 0, 0), (1, 0, 0), (0, 2, 0))), "012a"),
    "pad inside": (lambda x, y: lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 0), (1, 0, 1))), "01"),
    "pad with ones": (lambda x, y: lax.pad(x, 1.0, ((0, 0, 0), (0, 0, 0), (1, 0, 0))), ""),
    "sum": (lambda x, y: lax.reduce_sum_p.bind(x, axes=(1,), out_sharding=None), "02"),
    "extremum": (lambda x, y: jnp.max(x, axis=1), "02"),
    "cumsum": (lambda x, y: lax.cumsum(x, 1), "02"),
    "argmax": (lambda x, y: lax.argmax(x, 1, np.int32), "02"),
    "pool": (
        lambda x, y: lax.reduce_window(x, 0.0, lax.add, (1, 2, 1), (1, 1, 1), "SAME"),
        "02",
    ),
    "mixture": (lambda x, y: dot(y, x, ((1,), (1,)), ((0,), (0,))), "02"),
    "mixture, left": (lambda x, y: dot(x, y, ((1,), (1,)), ((0,), (0,))), "02"),
    "scores": (lambda x, y: dot(x, y, ((2,), (2,)), ((0,), (0,))), "01"),
    "two sides": (lambda x, y: dot(x, lax.mul(x, y), ((1,), (1,)), ((0,), (0,))), ""),
    "gather": (lambda x, y: lax.gather(x, ROWS, INNER, (1, 3, 4)), "12"),
    "gather of parts": (lambda x, y: lax.gather(x, ROWS, INNER, (1, 3, 2)), "1"),
    "dynamic slice": (lambda x, y: lax.dynamic_slice(x, (0, 1, 0), (2, 2, 4)), "02"),
    "scatter to zeros": (scatter_to_zeros, "12"),
    "scatter to others": (scatter_to_others, ""),
    "update of others": (update, ""),
    "sort": (lambda x, y: lax.sort(x), ""),
}


def through(function, channels):
    """The book, and the channels of the result."""
    closed = jax.make_jaxpr(function)(X, Y)
    book = Book()
    known = {}
    start = book.new(channels)
    for var, found in zip(closed.jaxpr.invars, (start, free(3)), strict=True):
        known[var] = found
    for var, const in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        known[var] = free(np.ndim(const))
    moving = {*closed.jaxpr.invars}

    def read(atom):
        if hasattr(atom, "val"):
            return free(atom.aval.ndim, ZERO if atom.val == 0 else FREE)
        return known[atom]

    for eqn in closed.jaxpr.eqns:
        operands = Operands(
            channels=[read(x) for x in eqn.invars],
            shapes=[tuple(x.aval.shape) for x in eqn.invars],
            settled=[hasattr(x, "val") or x not in moving for x in eqn.invars],
        )
        moving.update(eqn.outvars)
        found = apply_rule(book, eqn, operands)
        known.update(zip(eqn.outvars, found, strict=True))
    return book, start, read(closed.jaxpr.outvars[0])


def shape_along(axis):
    return SHAPE if axis == "a" else tuple(n if str(i) == axis else 1 for i, n in enumerate(SHAPE))


@pytest.mark.parametrize("axis", "012a")
@pytest.mark.parametrize("name", LAWS)
def test_scaling_channels_scales_the_result(name, axis):
    function, kept = LAWS[name]
    book, start, out = through(function, shape_along(axis))
    assert (book.resolve(start) >= 0).any() == (axis in kept)
    table = np.exp2(np.random.default_rng(1).integers(-3, 4, len(book))).astype(np.float32)

    def factors(channels):
        found = book.resolve(channels)
        return np.where(found >= 0, table[found], np.float32(1))

    scaled = function(X / factors(start), Y)
    wanted = np.asarray(function(X, Y))
    if np.issubdtype(wanted.dtype, np.integer):
        np.testing.assert_array_equal(scaled, wanted)
    else:
        wanted = (wanted.astype(np.float32) / factors(out)).astype(wanted.dtype)
        np.testing.assert_array_equal(scaled, wanted)


def multiplied(left, right, settled):
    """Whether each side's channels survive a product of both."""
    book = Book()
    sides = [book.new(left), book.new(right)]
    shape = tuple(map(max, left, right))
    eqn = jax.make_jaxpr(lax.mul)(jnp.zeros(shape), jnp.zeros(shape)).eqns[0]
    x = Operands(channels=sides, shapes=[shape, shape], settled=list(settled))
    (out,) = apply_rule(book, eqn, x)
    kept = [bool((book.resolve(side) >= 0).all()) for side in sides]
    np.testing.assert_array_equal(out, book.resolve(sides[kept.index(True)]))
    return kept


@pytest.mark.parametrize(
    "left, right, settled, kept",
    [
        # The side with more channels; then a parameter's; then the last one.
        ((2, 4), (1, 1), (False, True), [True, False]),
        ((1, 1), (2, 4), (True, False), [False, True]),
        ((1, 4), (1, 4), (True, False), [True, False]),
        ((1, 4), (1, 4), (False, True), [False, True]),
        ((1, 4), (1, 4), (False, False), [False, True]),
    ],
)
def test_of_two_factors_one_keeps_its_channels(left, right, settled, kept):
    assert multiplied(left, right, settled) == kept


def test_an_unknown_operation_fixes_what_it_reads():
    book, start, out = through(lambda x, y: lax.integer_pow(x, 3), SHAPE)
    assert (book.resolve(start) == FREE).all() and (out == FREE).all()
