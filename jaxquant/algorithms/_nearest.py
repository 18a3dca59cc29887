"""Rounding to nearest: the data-free algorithm, and the loop that applies it leaf by leaf."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..intercept import Account, LeafPlan, Plan
from ..intercept._variables import map_leaves, parameters, stamped
from ..numerics import as_bytes, from_bytes
from ..qarray import in_memory, place, QArray, quantize_array, Scheme, WeightError
from ..qarray._error import array_error, error_from, error_sums, square_sum
from ..qarray._sharding import automatic
from ._matrix import as_matrix, assemble, held_values


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


@functools.partial(jax.jit, static_argnames=("scheme", "contracted", "stack", "measured"))
def _bytewise(
    w: Any,
    scheme: Scheme,
    *,
    contracted: tuple[int, ...],
    stack: tuple[int, ...],
    key: Any,
    measured: bool,
) -> tuple[QArray, Any]:
    """`nearest` with a byte a code, and the sums of its error, or else of the squares of `w`."""
    q = quantize_array(w, scheme, contracted=contracted, stack=stack, key=key)
    sums = error_sums(w, q) if measured else square_sum(w.astype(jnp.float32))
    return dataclasses.replace(q, codes=as_bytes(q.codes)), sums


@jax.jit
def _all_finite(w: Any) -> Any:
    return jnp.isfinite(w).all()


@overload
def quantize(
    variables: Any,
    plan: Plan,
    *,
    key: Any = None,
    account: Literal[False] = False,
    progress: Callable[[str], None] | None = None,
) -> Any: ...
@overload
def quantize(
    variables: Any,
    plan: Plan,
    *,
    key: Any = None,
    account: Literal[True],
    progress: Callable[[str], None] | None = None,
) -> tuple[Any, Account]: ...
def quantize(
    variables: Any,
    plan: Plan,
    *,
    key: Any = None,
    account: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Any:
    """The tree with the parameters of `plan` as QArrays, rounded to nearest, leaf by leaf.

    Where the plan names an algorithm that needs no data, that one chooses the codes.

    Leaves may be anything that `numpy.asarray` reads, such as lazily loaded arrays: one is in
    memory at a time. Sharded leaves stay sharded: codes as the weight, scales as their tiles
    allow. With `account` the error of each weight is measured as its codes are made, and the
    result is the tree and an `Account`. With a `key` (of `jax.random`) codes are rounded at random,
    each weight by a key of its own, made from its path. `progress` is called with each path that is
    done.

    **Raises:** `ValueError` if a parameter is missing, has another shape than planned, or is not
    finite, or if the plan needs data.

    ```python
    qvariables, account = jq.quantize(variables, plan, account=True)
    print(account)  # every site: its scheme, true bits, signal to noise, and why
    ```
    """
    if plan.needs_calibration:
        sites = plan.needs_calibration
        raise ValueError(
            f"The recipe {plan.recipe!r} needs data at {len(sites)} sites, {sites[0]} the first. "
            "Give some: jaxquant.calibrate(model, variables, batches, plan)."
        )
    tree, errors = quantized_tree(variables, plan, {}, key=key, account=account, progress=progress)
    return (tree, errors) if errors is not None else tree


def quantized_tree(
    variables: Any,
    plan: Plan,
    chosen: Mapping[str, QArray],
    states: Mapping[str, Mapping[str, Any]] = {},
    *,
    key: Any = None,
    account: bool = False,
    lazily: bool = False,
    progress: Callable[[str], None] | None = None,
) -> tuple[Any, Account | None]:
    """What `quantize` returns, with the parameters in `chosen` (by path) held as given there.

    `states` are arrays that belong to sites, by site id and name. With `lazily`, what was to be
    read when asked for still is: parameters that stay as they are, and parts of `chosen`.
    """
    known = parameters(variables)
    missing = [path for path in plan.by_path if path not in known]
    if missing:
        raise ValueError(
            f"The plan quantizes {missing[0]}, which is not among the {len(known)} parameters. "
            "Quantize the variables that the plan was made with."
        )
    errors: dict[str, WeightError] = {}
    state_of: dict[str, dict[str, Any]] = {}
    for site, state in states.items():
        state_of.setdefault(plan.by_site[site].path, {}).update(state)

    def one(path: str | None, leaf: Any) -> Any:
        planned = None if path is None else plan.by_path.get(path)
        if planned is None:
            return leaf if lazily or isinstance(leaf, jax.Array) else _loaded(leaf)
        own = None if key is None else jax.random.fold_in(key, zlib.crc32(planned.path.encode()))
        algorithm = plan.algorithms.get(planned.path)
        if planned.path in chosen:
            own_state = state_of.get(planned.path, {})
            q, error = _given(leaf, planned, chosen[planned.path], account, own_state)
        elif algorithm is not None and not algorithm.observers:
            q, error = _given(leaf, planned, _by_algorithm(leaf, planned, algorithm), account)
        else:
            q, error = _leaf(leaf, planned, own, account)
        if error is not None:
            errors[planned.path] = error
        if progress is not None:
            progress(planned.path)
        return q

    tree = stamped(map_leaves(one, variables), plan.fingerprint, states)
    if not account:
        return tree, None
    ordered = tuple((leaf.path, errors[leaf.path]) for leaf in plan.leaves)
    return tree, Account(plan=plan, errors=ordered)


def _by_algorithm(leaf: Any, planned: LeafPlan, algorithm: Any) -> QArray:
    """A parameter as an algorithm that needs no data holds it."""
    w = _checked(leaf, planned)
    if not _all_finite(w):
        raise not_finite(planned.path)
    roles: dict[str, Any] = {"contracted": planned.contracted, "stack": planned.stack}
    sharding = getattr(w, "sharding", None)
    with automatic(sharding) as laid:
        w = w if laid is sharding else jax.device_put(w, laid)
        try:
            made = algorithm.run(as_matrix(w.astype(jnp.float32), **roles), {}, planned.scheme)
        except ValueError as error:
            raise ValueError(f"{planned.path}: {error}") from error
        if made.permutation is not None:
            raise ValueError(
                f"{algorithm} puts the inputs of {planned.path} in another order, which only "
                "jaxquant.calibrate keeps. Use that."
            )
        q = assemble(
            made.codes,
            made.scale,
            made.zero_point,
            offset=made.offset,
            shape=planned.shape,
            dtype=planned.dtype,
            scheme=planned.scheme,
            **roles,
        )
    return jax.block_until_ready(q)


def _given(
    leaf: Any, planned: LeafPlan, q: QArray, measured: bool, state: Mapping[str, Any] = {}
) -> tuple[QArray, WeightError | None]:
    """A parameter whose codes are chosen already, in place, and its error if that is wanted.

    `state` is that of its sites, which may permute or divide what the codes are multiplied with.
    """
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        q = place(q, sharding)
    if not measured:
        return q, None
    w = leaf if isinstance(leaf, jax.Array) else jnp.asarray(np.asarray(leaf))
    read = in_memory(q)
    if {"permutation", "smoothing"} & set(state):
        roles: dict[str, Any] = {"contracted": planned.contracted, "stack": planned.stack}
        return q, array_error(as_matrix(w, **roles), held_values(read, state, **roles))
    return q, error_from(_error_sums(w, read), w, read)


_error_sums = jax.jit(error_sums)


def _leaf(
    leaf: Any, planned: LeafPlan, key: Any, measured: bool
) -> tuple[QArray, WeightError | None]:
    """One parameter, quantized and in place, and its error if it is to be measured."""
    w = _checked(leaf, planned)
    sharding = getattr(w, "sharding", None)
    with automatic(sharding) as laid:
        w = w if laid is sharding else jax.device_put(w, laid)
        q, sums = _bytewise(
            w,
            planned.scheme,
            contracted=planned.contracted,
            stack=planned.stack,
            key=key,
            measured=measured,
        )
    squares = sums.signal if measured else sums
    # A sum of squares is finite only if all values are; the squares of finite ones may not be.
    if not math.isfinite(squares) and not _all_finite(w):
        raise not_finite(planned.path)
    q = dataclasses.replace(q, codes=from_bytes(q.codes, planned.scheme.values))
    if isinstance(sharding, jax.sharding.NamedSharding):
        q = place(q, sharding)
    q = jax.block_until_ready(q)
    return q, error_from(sums, w, q) if measured else None


def _checked(leaf: Any, planned: LeafPlan) -> Array:
    """A parameter in memory, of the shape that was planned."""
    if tuple(leaf.shape) != planned.shape:
        raise ValueError(
            f"{planned.path} has shape {tuple(leaf.shape)}, but the plan was made for "
            f"{planned.shape}. Make a plan with these variables."
        )
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(np.asarray(leaf))


def not_finite(name: str) -> ValueError:
    """What is raised for a parameter, or a part of one, that cannot be quantized."""
    return ValueError(
        f"{name} holds NaN or infinity, which no code stands for. Repair the checkpoint, "
        "or leave this parameter by a rule."
    )


def _loaded(leaf: Any) -> Any:
    """A leaf that stays as it is, read into memory if it was not."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(
            "Shapes alone cannot be quantized. Give variables with values; for shapes of the "
            "result use jax.eval_shape."
        )
    return jnp.asarray(np.asarray(leaf)) if hasattr(leaf, "__array__") else leaf
