"""Every backend of the dot with plain activations: gradients, `vmap`, `scan`, devices.

Forward for all cases and schemes is in test_dots.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from products import bound, Case, CASES, exact, operands, product, run_or_skip, stored_for
from quantized import normal, SCHEMES, uneven

from jaxquant.ops import BACKENDS
from jaxquant.qarray import place, quantize_array

every_backend = pytest.mark.parametrize("backend", BACKENDS)
ROWS = CASES["rows"]
MESH = Mesh(np.asarray(jax.devices()), ("x",))


def _gradient(case: Case, sides: list, outer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of `sum(outer * product)` in the plain side, and what may be lost of it."""
    inputs, out = case.letters.split("->")
    names = inputs.split(",")
    plain, weight = names[1 - case.weight], names[case.weight]
    w = exact(sides[case.weight])
    letters = f"{out},{weight}->{plain}"
    magnitude = np.einsum(letters, np.abs(outer), np.abs(w))
    summed = [n for c, n in zip(weight, w.shape, strict=True) if c not in plain]
    roundings = np.prod(summed, dtype=int) + 8
    return np.einsum(letters, outer, w), roundings * 2.0**-24 * magnitude


GRADIENTS = ["rows", "vector", "weight on the left", "several in another order", "two batches"]


@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64", "e4m3 channel"])
@pytest.mark.parametrize("case", [CASES[name] for name in GRADIENTS], ids=GRADIENTS)
@every_backend
def test_the_gradient_is_the_outer_gradient_by_the_weight(backend: str, case: Case, name: str):
    sides = operands(case, None, name)
    outer = normal(*product(case, *sides).shape, seed=5)
    w = stored_for(backend, case, sides[case.weight])

    @jax.jit
    def gradient(x, w):
        def loss(x):
            operands = (x, w) if case.weight == 1 else (w, x)
            return (outer * run_or_skip(backend, *operands, case.numbers)).sum()

        return jax.grad(loss)(x)

    got = gradient(sides[1 - case.weight], w)
    expected, allowed = _gradient(case, sides, exact(outer))
    assert (np.abs(np.asarray(got) - expected) <= allowed).all()


@every_backend
def test_a_tangent_goes_through_as_the_linear_map(backend: str):
    x, q = operands(ROWS, None, "int8 channel")
    w = stored_for(backend, ROWS, q)
    dx = normal(*x.shape, seed=9)
    _, got = jax.jvp(lambda x: run_or_skip(backend, x, w, ROWS.numbers), (x,), (dx,))
    moved = np.abs(np.asarray(got) - product(ROWS, dx, q))
    assert (moved <= bound(ROWS, dx, q, halves=False)).all()


@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64"])
@every_backend
def test_stacked_weights_work_in_vmap_and_scan_forward_and_backward(backend: str, name: str):
    case = CASES["rows"]
    weights = [
        stored_for(
            backend, case, quantize_array(uneven(256, 24, seed=i), SCHEMES[name], contracted=(0,))
        )
        for i in range(3)
    ]
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *weights)
    xs = normal(3, 8, 256, seed=7)
    outer = normal(3, 8, 24, seed=5)

    def each(x, w):
        return run_or_skip(backend, x, w, case.numbers)

    def scanned(xs, stack):
        return jax.lax.scan(lambda _, xw: (None, each(*xw)), None, (xs, stack))[1]

    for run in (jax.vmap(each), scanned):

        @jax.jit
        def both(xs, stack, run=run):
            y, pull = jax.vjp(lambda xs: run(xs, stack), xs)
            return y, pull(outer)[0]

        y, dxs = both(xs, stack)
        for i, w in enumerate(weights):
            sides = [xs[i], w]
            moved = np.abs(np.asarray(y[i]) - product(case, *sides))
            assert (moved <= bound(case, *sides, halves=False)).all()
            expected, allowed = _gradient(case, sides, exact(outer[i]))
            assert (np.abs(np.asarray(dxs[i]) - expected) <= allowed).all()


@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64"])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=["contracted", "outputs"])
@every_backend
def test_four_devices_compute_the_same(backend: str, spec: P, name: str):
    """Also where a weight of 9 groups lies on 4 devices."""
    case = Case(((8, 576), (576, 32)), ((1,), (0,)))
    x, q = operands(case, None, name)
    assert name != "int4 zero g64" or q.scale.shape[0] == 9
    stored = stored_for(backend, case, q)
    try:
        w = place(stored, NamedSharding(MESH, spec))
    except ValueError as cut:
        assert stored.layout.packed is not None
        pytest.skip(str(cut))
    outer = normal(8, 32, seed=5)

    @jax.jit
    def run(x, w):
        y, pull = jax.vjp(lambda x: run_or_skip(backend, x, w, case.numbers), x)
        return y, pull(outer)[0]

    for x_spec in (P(), P("x"), P(None, "x")):
        y, dx = run(jax.device_put(x, NamedSharding(MESH, x_spec)), w)
        moved = np.abs(np.asarray(y) - product(case, x, q))
        assert (moved <= bound(case, x, q, halves=False)).all()
        expected, allowed = _gradient(case, [x, q], exact(outer))
        assert (np.abs(np.asarray(dx) - expected) <= allowed).all()
