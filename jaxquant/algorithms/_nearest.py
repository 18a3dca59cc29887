"""Rounding to nearest: the data-free algorithm, and the loop that applies it leaf by leaf."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..intercept import Plan
from ..intercept._variables import map_leaves, parameters, stamped
from ..qarray import place, QArray, quantize_array, Scheme
from ..qarray._sharding import automatic


@functools.partial(jax.jit, static_argnames=("scheme", "contracted", "stack"))
def nearest(
    w: Any,
    scheme: Scheme,
    *,
    contracted: tuple[int, ...],
    stack: tuple[int, ...] = (),
    key: Any = None,
) -> QArray:
    """Each value to its nearest code; each tile's scale by the scheme's range rule."""
    return quantize_array(w, scheme, contracted=contracted, stack=stack, key=key)


@jax.jit
def _all_finite(w: Any) -> Any:
    return jnp.isfinite(w).all()


def quantize(variables: Any, plan: Plan, *, progress: Callable[[str], None] | None = None) -> Any:
    """The tree with the parameters of `plan` as QArrays, rounded to nearest, leaf by leaf.

    Leaves may be anything that `numpy.asarray` reads, such as lazily loaded arrays: one is in
    memory at a time. Sharded leaves stay sharded: codes as the weight, scales as their tiles
    allow. `progress` is called with each path that is done.

    **Raises:** `ValueError` if a parameter is missing, has another shape than planned, or is not
    finite.

    ```python
    qvariables = jq.quantize(variables, plan)
    ```
    """
    known = parameters(variables)
    missing = [path for path in plan.by_path if path not in known]
    if missing:
        raise ValueError(
            f"The plan quantizes {missing[0]}, which is not among the {len(known)} parameters. "
            "Quantize the variables that the plan was made with."
        )

    def one(path: str | None, leaf: Any) -> Any:
        planned = None if path is None else plan.by_path.get(path)
        if planned is None:
            return leaf if isinstance(leaf, jax.Array) else _loaded(leaf)
        if tuple(leaf.shape) != planned.shape:
            raise ValueError(
                f"{path} has shape {tuple(leaf.shape)}, but the plan was made for "
                f"{planned.shape}. Make a plan with these variables."
            )
        w = leaf if isinstance(leaf, jax.Array) else jnp.asarray(np.asarray(leaf))
        if not _all_finite(w):
            raise ValueError(
                f"{path} holds NaN or infinity, which no code stands for. Repair the checkpoint, "
                "or leave this parameter by a rule."
            )
        sharding = getattr(w, "sharding", None)
        with automatic(sharding) as laid:
            w = w if laid is sharding else jax.device_put(w, laid)
            q = nearest(w, planned.scheme, contracted=planned.contracted, stack=planned.stack)
        if isinstance(sharding, jax.sharding.NamedSharding):
            q = place(q, sharding)
        q = jax.block_until_ready(q)
        if progress is not None:
            progress(planned.path)
        return q

    return stamped(map_leaves(one, variables), plan.fingerprint)


def _loaded(leaf: Any) -> Any:
    """A leaf that stays as it is, read into memory if it was not."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(
            "Shapes alone cannot be quantized. Give variables with values; for shapes of the "
            "result use jax.eval_shape."
        )
    return jnp.asarray(np.asarray(leaf)) if hasattr(leaf, "__array__") else leaf
