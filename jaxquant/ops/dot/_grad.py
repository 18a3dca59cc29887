"""How kernels are differentiated: as the product that they compute, in XLA's form."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from ...qarray import QArray, quantize_array, Scheme
from .._target import target_device
from ._call import DotCall, Layer
from ._xla import run as run_xla

# From `x [rows, k]`, an array or a QArray, and a weight of two axes to their product; perhaps with
# the layer of a stack that the weight is.
Kernel = Callable[..., Array]


def product(
    run: Kernel,
    x: Float[Array, "rows k"] | QArray,
    w: QArray,
    layer: Layer | None = None,
    *,
    summed: int,
    precision: Any = None,
    activations: Scheme | None = None,
) -> Float[Array, "rows n"]:
    """`run(x, w)`, differentiated in a plain `x` and in scales by the form of XLA.

    With `layer`, where `w` lies in a stack, it is `run(x, w, layer)`. `summed` is the logical axis
    of `w` that is contracted. `run` must close over nothing that is traced; with `activations` it
    rounds `x`, whose gradient is then zero. Under `vmap`, `scan` and `jit` it is batched and traced
    as it is.
    """
    beside = () if layer is None else (layer,)
    return _product(run, summed, precision, activations, x, w, *beside)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _product(
    run: Kernel, summed: int, precision: Any, activations: Scheme | None, *operands: Any
) -> Array:
    return run(*operands)


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

    # The layer of a stack is the weight once more.
    _, moved = jax.jvp(linear, primals[:2], tangents[:2])
    return y, moved
