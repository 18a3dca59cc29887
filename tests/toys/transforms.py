"""One row for each way in which JAX hands a weight to a body: a table for laws.

Each row computes with JAX and, in `steps`, says by hand what is multiplied with what: pairs of an
input and a weight, in the order of the steps of a loop.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from exact import small
from jax import lax

K = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """`function(x, w)`; the weight's shape; what each site sees, step by step."""

    name: str
    function: Callable[[Any, Any], Any]
    shape: tuple[int, ...]
    stacked: bool = False
    seen: Callable[[Any, Any], dict[str, list[Any]]]
    # Which derivatives the plain function has under `jit`.
    forward: bool = True
    reverse: bool = True

    def __str__(self) -> str:
        return self.name


def layer(x, w):
    return small(x @ w)


def once(x, w):
    return {"w#dot": [x]}


def thrice(x, w):
    """The same weight three times in a row."""
    seen = []
    for _ in range(3):
        seen.append(x)
        x = layer(x, w)
    return {"w#dot": seen}


def each(x, w):
    """One layer after the other."""
    seen = []
    for i in range(w.shape[0]):
        seen.append(x)
        x = layer(x, w[i])
    return {"w#dot": seen}


def scan_constant(x, w):
    return lax.scan(lambda x, _: (layer(x, w), None), x, None, length=3)[0]


def scan_carry(x, w):
    def body(carry, _):
        x, w = carry
        return (layer(x, w), w), x.sum()

    (x, w), sums = lax.scan(body, (x, w), None, length=3)
    return x, sums


def scan_input(x, w):
    return lax.scan(lambda x, w: (layer(x, w), None), x, w)[0]


def scan_input_in_a_tuple(x, w):
    def body(x, slices):
        (i, slice), shift = slices
        return layer(x, slice["kernel"]) + shift - shift, i

    return lax.scan(body, x, ((jnp.arange(3), {"kernel": w}), jnp.ones(3)))


def scan_reversed(x, w):
    return lax.scan(lambda x, w: (layer(x, w), None), x, w[::-1], reverse=True)[0]


def scan_unrolled(x, w):
    return lax.scan(lambda x, w: (layer(x, w), None), x, w, unroll=2)[0]


def fori_indexed(x, w):
    return lax.fori_loop(0, 3, lambda i, x: layer(x, w[i]), x)


def while_constant(x, w):
    def body(state):
        i, x = state
        return i + 1, layer(x, w)

    return lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]


def while_carry(x, w):
    def body(state):
        i, x, w = state
        return i + 1, layer(x, w), w

    return lax.while_loop(lambda state: state[0] < 3, body, (0, x, w))[1]


def while_indexed(x, w):
    def body(state):
        i, x = state
        return i + 1, layer(x, lax.dynamic_index_in_dim(w, i, 0, keepdims=False))

    return lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]


def while_condition(x, w):
    """The weight is read by the condition, which is computed once more than the body."""
    return lax.while_loop(
        lambda state: (state[0] < 2) & ((state[1] @ w).sum() > -1e9),
        lambda state: (state[0] + 1, state[1] + 1),
        (0, x),
    )[1]


def seen_by_condition(x, w):
    return {"w#dot": [x, x + 1, x + 2]}


def cond_taken(x, w):
    return lax.cond(x[0, 0] < 1e9, lambda x, w: layer(x, w), lambda x, w: x + 1, x, w)


def cond_not_taken(x, w):
    return lax.cond(x[0, 0] > 1e9, lambda x, w: layer(x, w), lambda x, w: x + 1, x, w)


def cond_two_sites(x, w):
    return lax.switch(1, [lambda x: layer(x, w), lambda x: layer(x + 1, w) + 1, lambda x: x], x)


@jax.custom_jvp
def crooked(x, w):
    """A layer whose derivative, by the user's rule, is three times the true one."""
    return layer(x, w)


@crooked.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return layer(x, w), 3.0 * (dx @ w + x @ dw)


@jax.custom_vjp
def bent(x, w):
    """A layer whose derivative, by the user's rule, is five times the true one, unclipped."""
    return layer(x, w)


bent.defvjp(
    lambda x, w: (layer(x, w), (x, w)),
    lambda saved, g: (5.0 * (g @ saved[1].T), saved[0].T @ g),
)


def in_custom_jvp_scanned(x, w):
    return lax.scan(lambda x, w: (small(crooked(x, w)), None), x, w)[0]


def in_custom_vjp_scanned(x, w):
    return lax.scan(lambda x, w: (small(bent(x, w)), None), x, w)[0]


def closed_custom_jvp(x, w):
    """The weight is closed over, as a constant of the rule."""

    @jax.custom_jvp
    def f(x):
        return layer(x, w)

    f.defjvp(lambda primals, tangents: (f(primals[0]), 7.0 * (tangents[0] @ w)))
    return f(x)


def vmap_constant(x, w):
    return jax.vmap(lambda row: small(row @ w))(x)


def vmap_batched(x, w):
    return jax.vmap(layer)(jnp.stack([x, x + 1, x - 1]), w)


def vmap_batched_last(x, w):
    return jax.vmap(layer, in_axes=(None, 2))(x, w)


def scan_remat_cond(x, w):
    @jax.checkpoint
    def block(x, w):
        return lax.cond(x[0, 0] < 1e9, layer, lambda x, w: x, x, w)

    return lax.scan(lambda x, w: (block(x, w), None), x, w)[0]


def jit_in_scan(x, w):
    return lax.scan(lambda x, w: (jax.jit(layer)(x, w), None), x, w)[0]


def scan_in_scan(x, w):
    def outer(x, w):
        return lax.scan(lambda x, w: (layer(x, w), None), x, w)[0], None

    return lax.scan(outer, x, w)[0]


def scan_in_scan_constant(x, w):
    def outer(x, w):
        return lax.scan(lambda x, _: (layer(x, w), None), x, None, length=2)[0], None

    return lax.scan(outer, x, w)[0]


def each_twice(x, w):
    seen = []
    for i in range(w.shape[0]):
        seen.append([x, layer(x, w[i])])
        x = layer(layer(x, w[i]), w[i])
    return {"w#dot": [jnp.concatenate(pair) for pair in seen]}


def each_of_each(x, w):
    seen = each(x, w.reshape(-1, K, K))["w#dot"]
    return {"w#dot": seen}


def batch_seen(x, w):
    return {"w#dot": [x, x + 1, x - 1]}


def switch_seen(x, w):
    return {"w#dot": [0 * x], "w#dot.1": [x + 1]}


ONE, MANY = (K, K), (3, K, K)

ROWS = (
    Row(name="jit constant", function=lambda x, w: jax.jit(layer)(x, w), shape=ONE, seen=once),
    Row(name="scan constant", function=scan_constant, shape=ONE, seen=thrice),
    Row(name="scan carry", function=scan_carry, shape=ONE, seen=thrice),
    Row(name="scan input", function=scan_input, shape=MANY, seen=each, stacked=True),
    Row(name="scan tuple", function=scan_input_in_a_tuple, shape=MANY, seen=each, stacked=True),
    Row(name="scan unrolled", function=scan_unrolled, shape=MANY, seen=each, stacked=True),
    Row(name="fori indexed", function=fori_indexed, shape=MANY, seen=each),
    Row(name="remat", function=jax.checkpoint(layer), shape=ONE, seen=once),
    Row(name="while constant", function=while_constant, shape=ONE, seen=thrice, reverse=False),
    Row(name="while carry", function=while_carry, shape=ONE, seen=thrice, reverse=False),
    Row(name="while indexed", function=while_indexed, shape=MANY, seen=each, reverse=False),
    Row(
        name="while condition",
        function=while_condition,
        shape=ONE,
        seen=seen_by_condition,
        reverse=False,
    ),
    Row(name="cond taken", function=cond_taken, shape=ONE, seen=once),
    Row(
        name="cond not taken",
        function=cond_not_taken,
        shape=ONE,
        seen=lambda x, w: {"w#dot": []},
    ),
    Row(name="cond two sites", function=cond_two_sites, shape=ONE, seen=switch_seen),
    Row(name="custom_jvp", function=crooked, shape=ONE, seen=once),
    Row(
        name="custom_jvp closed",
        function=closed_custom_jvp,
        shape=ONE,
        seen=once,
        forward=False,
        reverse=False,
    ),
    Row(
        name="custom_jvp scanned",
        function=in_custom_jvp_scanned,
        shape=MANY,
        seen=each,
        stacked=True,
    ),
    Row(name="custom_vjp", function=bent, shape=ONE, seen=once, forward=False),
    Row(
        name="custom_vjp scanned",
        function=in_custom_vjp_scanned,
        shape=MANY,
        seen=each,
        stacked=True,
        forward=False,
    ),
    Row(name="vmap constant", function=vmap_constant, shape=ONE, seen=once),
    Row(name="vmap batched", function=vmap_batched, shape=MANY, seen=batch_seen, stacked=True),
    Row(name="scan remat cond", function=scan_remat_cond, shape=MANY, seen=each, stacked=True),
    Row(name="jit in scan", function=jit_in_scan, shape=MANY, seen=each, stacked=True),
    Row(
        name="scan in scan",
        function=scan_in_scan,
        shape=(2, 2, K, K),
        seen=each_of_each,
        stacked=True,
    ),
    Row(
        name="scan in scan constant",
        function=scan_in_scan_constant,
        shape=MANY,
        seen=each_twice,
        stacked=True,
    ),
)
