"""How kernels are differentiated: as the product that they compute, in XLA's form."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

from ...qarray import QArray
from .._target import target_device
from ._call import DotCall
from ._xla import weight_only

# From `x [rows, k]` and a weight of two axes to their product.
Kernel = Callable[[Array, QArray], Array]


def product(
    run: Kernel, x: Float[Array, "rows k"], w: QArray, *, summed: int, precision: Any = None
) -> Float[Array, "rows n"]:
    """`run(x, w)`, differentiated in `x` and in the scales of `w` by the weight-only form of XLA.

    `summed` is the logical axis of `w` that is contracted. `run` must close over nothing that is
    traced. Under `vmap`, `scan` and `jit` it is batched and traced as it is.
    """
    return _product(run, summed, precision, x, w)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _product(run: Kernel, summed: int, precision: Any, x: Array, w: QArray) -> Array:
    return run(x, w)


@_product.defjvp
def _jvp(run: Kernel, summed: int, precision: Any, primals: Any, tangents: Any) -> Any:
    y = _product(run, summed, precision, *primals)

    def linear(x: Any, w: QArray) -> Array:
        call = DotCall(
            lhs=x,
            rhs=w,
            contracted=((1,), (summed,)),
            batch=((), ()),
            precision=precision,
            out_dtype=y.dtype,
            device=target_device(),
        )
        return weight_only(call)

    _, moved = jax.jvp(linear, primals, tangents)
    return y, moved
