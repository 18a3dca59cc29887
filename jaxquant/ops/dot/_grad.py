"""How kernels are differentiated: as the product that they compute, in XLA's form."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from ...qarray import QArray, quantize_array, Scheme
from .._target import target_device
from ._call import DotCall
from ._xla import run as run_xla

# From `x [rows, k]`, an array or a QArray, and a weight of two axes to their product.
Kernel = Callable[[Any, QArray], Array]


def product(
    run: Kernel,
    x: Float[Array, "rows k"] | QArray,
    w: QArray,
    *,
    summed: int,
    precision: Any = None,
    activations: Scheme | None = None,
) -> Float[Array, "rows n"]:
    """`run(x, w)`, differentiated in a plain `x` and in scales by the form of XLA.

    `summed` is the logical axis of `w` that is contracted. `run` must close over nothing that is
    traced; with `activations` it rounds `x`, whose gradient is then zero. Under `vmap`, `scan` and
    `jit` it is batched and traced as it is.
    """
    return _product(run, summed, precision, activations, x, w)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _product(
    run: Kernel, summed: int, precision: Any, activations: Scheme | None, x: Any, w: QArray
) -> Array:
    return run(x, w)


@_product.defjvp
def _jvp(
    run: Kernel,
    summed: int,
    precision: Any,
    activations: Scheme | None,
    primals: Any,
    tangents: Any,
) -> Any:
    y = _product(run, summed, precision, activations, *primals)

    def linear(x: Any, w: QArray) -> Array:
        if activations is not None:
            x = quantize_array(lax.stop_gradient(x), activations, contracted=(1,))
        call = DotCall(
            lhs=x,
            rhs=w,
            contracted=((1,), (summed,)),
            batch=((), ()),
            precision=precision,
            out_dtype=y.dtype,
            device=target_device(),
        )
        return run_xla(call)

    _, moved = jax.jvp(linear, primals, tangents)
    return y, moved
