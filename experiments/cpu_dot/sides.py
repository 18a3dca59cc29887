"""What is timed: one product `x @ w`, in float32 and by each scheme, layout and backend."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxquant as jq
from jaxquant.ops import choose_backend
from jaxquant.ops.dot import layout_for
from jaxquant.ops.dot._api import make_call

ROWS = (((1,), (0,)), ((), ()))
"""Dimension numbers of `x @ w`."""
INT8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
E4M3 = jq.Scheme(values=jq.E4M3, tile=jq.PER_CHANNEL)
INT4 = jq.Scheme(
    values=jq.INT4,
    tile=jq.Tile(contracted=64),
    scale=jq.BFLOAT16,
    range=jq.AbsMax(convention=jq.Convention.SIGNED),
)
# Weights of one program are different arrays, as those of a model's layers are: enough of them that
# even their codes do not fit a core's own cache.
BYTES_OF_WEIGHTS = 16 << 20
MOST_WEIGHTS = 16
FLOAT_SIDES = ("float32 [k, n]", "float32 [n, k]")
PEER = "qwix"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """A product, the weights it reads, and which backend computes it (or whose it is)."""

    name: str
    backend: str
    product: Callable[[Any, Any], Any]
    weights: list[Any]
    note: str = ""

    def run(self, x: jax.Array) -> Callable[[], Any]:
        """All products of the side, each waiting for the one before, as one compiled call."""

        def chain(x: Any, weights: list[Any]) -> Any:
            y = x
            for w in weights:
                # The barrier keeps all of `y` alive; the sum makes the next product wait for it.
                y = lax.optimization_barrier(self.product(x, w))
                x = x + y[:1, :1] * np.float32(1e-20)
            return y

        compiled = jax.jit(chain)
        return lambda: compiled(x, self.weights)

    def first(self, x: jax.Array) -> np.ndarray:
        """The product with the first weight."""
        return np.asarray(jax.jit(self.product)(x, self.weights[0]), np.float64)


def weights_of(shape: tuple[int, int]) -> list[jax.Array]:
    """Different weights of one shape, in float32."""
    size = 4 * shape[0] * shape[1]
    count = max(1, min(MOST_WEIGHTS, BYTES_OF_WEIGHTS // size))
    keys = jax.random.split(jax.random.key(0), count)
    return [jax.random.normal(key, shape) / np.float32(np.sqrt(shape[0])) for key in keys]


def sides(x: jax.Array, weights: list[jax.Array], wanted: Callable[[str], bool]) -> list[Side]:
    """Every side whose name is wanted; float32 first."""
    made = [*_float_sides(weights), *_our_sides(x, weights, wanted)]
    if has_peer():
        made += _peer_sides(weights, wanted)
    return [side for side in made if wanted(side.name)]


def _float_sides(weights: list[jax.Array]) -> Iterator[Side]:
    by_input, by_output = FLOAT_SIDES
    yield Side(name=by_input, backend="XLA", product=lambda x, w: x @ w, weights=weights)
    yield Side(
        name=by_output,
        backend="XLA",
        product=lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ()))),
        weights=[jnp.array(w.T) for w in weights],
    )


def _our_sides(x: jax.Array, weights: list[jax.Array], wanted: Any) -> Iterator[Side]:
    for name, scheme, activations in (
        ("w8a16", INT8, None),
        ("w8a8", INT8, INT8),
        ("fp8", E4M3, E4M3),
        ("w4a16 g64", INT4, None),
    ):
        if not any(wanted(f"{name}, {layout}") for layout in ("canonical", "prepared", "packed")):
            continue
        quantize = jax.jit(lambda w, scheme=scheme: jq.quantize_array(w, scheme, contracted=(0,)))
        canonical = [quantize(w) for w in weights]
        yield _our_side(f"{name}, canonical", x, canonical, activations, "xla")
        layout = layout_for("xla_cpu", canonical[0], (0,), ())
        layouts = {"prepared": layout}
        if scheme is INT4:
            packed = dataclasses.replace(layout, packed=scheme.tile.contracted, wide=False)
            layouts["packed"] = packed
        for title, layout in layouts.items():
            stored = [jq.relayout(q, layout) for q in canonical]
            yield _our_side(f"{name}, {title}", x, stored, activations, None)


def _our_side(
    name: str,
    x: jax.Array,
    weights: list[jq.QArray],
    activations: jq.Scheme | None,
    backend: str | None,
) -> Side:
    """One of ours; without a backend's name, the one that the package chooses."""

    def product(x: Any, w: Any) -> Any:
        if activations is not None:
            x = jq.quantize_activation(x, activations, contracted=(1,))
        return jq.dot_general(x, w, ROWS, backend=backend)

    rounded = x
    if activations is not None:
        rounded = jq.quantize_activation(x, activations, contracted=(1,))
    chosen, reasons = choose_backend(make_call(rounded, weights[0], ROWS), backend)
    note = "; ".join(f"{other} refuses: {reason}" for other, reason in reasons.items())
    return Side(name=name, backend=chosen, product=product, weights=weights, note=note)


def has_peer() -> bool:
    """Whether qwix is installed; it is compared with, never needed."""
    return importlib.util.find_spec(PEER) is not None


def _peer_sides(weights: list[jax.Array], wanted: Any) -> Iterator[Side]:
    import qwix

    for name, dtype, rounds, tiles in (
        ("w8a16", jnp.int8, False, None),
        ("w8a8", jnp.int8, True, None),
        ("fp8", jnp.float8_e4m3fn, True, None),
        ("w4a16 g64", jnp.int4, False, {0: 64}),
    ):
        if not wanted(f"{name}, {PEER}"):
            continue

        def product(x: Any, w: Any, dtype: Any = dtype, rounds: bool = rounds) -> Any:
            if rounds:
                x = qwix.quantize(x, dtype, channelwise_axes=(0,))
            return qwix.dot_general(x, w, ROWS)

        yield Side(
            name=f"{name}, {PEER}",
            backend=PEER,
            product=product,
            weights=[
                qwix.quantize(w, dtype, channelwise_axes=(1,), tiled_axes=tiles) for w in weights
            ],
        )
