"""Folding factors into parameters: sources are divided by `s`, weights of sites multiplied."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float32

from ..intercept import Fold, Root
from ..intercept._fold import checked
from ..intercept._variables import map_leaves, parameters
from ..qarray import QArray

Factors = tuple[Float32[np.ndarray, "..."], ...]
"""What an array is multiplied by, one after the other; each broadcasts to it."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScaledArray:
    """A lazily loaded array times factors: read and multiplied whenever it is asked for.

    Products are float32 and rounded to `dtype` once, so that a bfloat16 parameter changes by up to
    half a unit in its last place beside the factors. It is a leaf of any pytree.
    """

    of: Any
    factors: Factors

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.of.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.of.dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes the array takes once read."""
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The numbers, as a NumPy array."""
        return times(np.asarray(self.of), self.factors)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(
                "A scaled array is computed when it is read, so it cannot be had without a copy. "
                "Leave copy=False out."
            )
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"ScaledArray({self.of!r})"


def times(w: Any, factors: Factors) -> Any:
    """`w` times the factors in float32 (float64 if it is), in its own dtype again; NumPy or JAX.

    Shardings of JAX arrays stay as they are.
    """
    wide = np.dtype(np.float64 if w.dtype == np.float64 else np.float32)
    out = w.astype(wide)
    for factor in factors:
        out = out * _beside(w, factor.astype(wide))
    return out.astype(w.dtype)


def _beside(w: Any, factor: np.ndarray) -> Any:
    """A factor on the devices of `w`, each axis sharded as that of `w` if it has its length."""
    if not isinstance(w, jax.Array):
        return factor
    if not isinstance(w.sharding, NamedSharding):
        return jnp.asarray(factor)
    entries = (*w.sharding.spec, *(None,) * (w.ndim - len(w.sharding.spec)))
    spec = [None if n == 1 else e for n, e in zip(factor.shape, entries, strict=True)]
    return jax.device_put(factor, NamedSharding(w.sharding.mesh, PartitionSpec(*spec)))


def root_factors(folds: Sequence[tuple[Fold, Any]]) -> dict[Root, Factors]:
    """What each parameter, or slice of a stacked one, is multiplied by.

    Each `s` has the shape of its fold, is positive, and constant within each class of it
    (`jaxquant.intercept` has `tie`, which makes it so).

    **Raises:** `ValueError` where an `s` is not like that, or two folds scale the same inputs.
    """
    result: dict[Root, Factors] = {}
    taken: set[tuple[str, Root]] = set()
    for fold, s in folds:
        flat = checked(s, fold).reshape(-1)
        if fold.channels is not None:
            classes = fold.channels.reshape(-1)
            wanted = np.where(classes >= 0, flat[classes], np.float32(1))
            if not np.array_equal(flat, wanted):
                at = int(np.argmax(flat != wanted))
                raise ValueError(
                    f"The fold {fold} scales some inputs alike, but factor {at} is {flat[at]}, "
                    f"not {wanted[at]} as its class has it. Give tie(s, fold)."
                )
        for site in fold.sites:
            if (site.site, site.root) in taken:
                raise ValueError(
                    f"The inputs of {site.site} ({site.root}) are scaled by two folds. Give one, "
                    "with the product of both factors."
                )
            taken.add((site.site, site.root))
        for end, up in [(e, False) for e in fold.sources] + [(e, True) for e in fold.sites]:
            picked = np.where(end.channels >= 0, flat[end.channels], np.float32(1))
            factor = picked if up else np.float32(1) / picked
            result[end.root] = (*result.get(end.root, ()), factor)
    return result


def apply_folds(variables: Any, folds: Sequence[tuple[Fold, Any]]) -> Any:
    """The variables with each `s` folded in: the same function, other inputs of sites.

    Works on Linen's trees and NNX's states; layers stored as a stack get one `s` each. Dtypes and
    shardings stay. Arrays of JAX and NumPy are multiplied at once, lazily loaded ones when they are
    read (`ScaledArray`); where a leaf is a shape alone there is nothing to do.

    **Raises:** `ValueError` as `root_factors`, or where a parameter is missing or quantized.

    ```python
    folds = find_folds(trace(model, variables, tokens))
    scaled = apply_folds(variables, [(fold, tie(s, fold)) for fold, s in zip(folds, chosen)])
    ```
    """
    by_path: dict[str, dict[Root, Factors]] = {}
    for root, factors in root_factors(folds).items():
        by_path.setdefault(root.path, {})[root] = factors
    known = parameters(variables)
    missing = [path for path in by_path if path not in known]
    if missing:
        raise ValueError(
            f"A fold scales {missing[0]}, which is not among the {len(known)} parameters. Fold "
            "into the variables that the graph was traced with."
        )

    def one(path: str | None, leaf: Any) -> Any:
        if path not in by_path or isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if isinstance(leaf, QArray):
            raise ValueError(f"{path} is quantized already. Fold first, then quantize.")
        factors = _whole(by_path[path], len(leaf.shape), tuple(leaf.shape))
        if isinstance(leaf, (jax.Array, np.ndarray)):
            return times(leaf, factors)
        return ScaledArray(of=leaf, factors=factors)

    return map_leaves(one, variables)


def _whole(slices: Mapping[Root, Factors], ndim: int, shape: tuple[int, ...]) -> Factors:
    """Factors of a stacked parameter from those of its slices; of others as they are.

    Factors that vary along the same axes make one.
    """
    merged: dict[tuple[int, ...], np.ndarray] = {}
    for root, factors in slices.items():
        steps = dict(root.steps)
        left = [axis for axis in range(ndim) if axis not in steps]
        for factor in factors:
            sizes = [shape[axis] if axis in steps else 1 for axis in range(ndim)]
            for axis, size in zip(left, factor.shape, strict=True):
                sizes[axis] = size
            whole = merged.setdefault(tuple(sizes), np.ones(sizes, np.float32))
            index = tuple(steps.get(axis, slice(None)) for axis in range(ndim))
            whole[index] *= factor
    return tuple(merged.values())
