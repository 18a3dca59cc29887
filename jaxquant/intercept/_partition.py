"""Which leaves are trained: apart from frozen codes, and told from each other for optimizers."""

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp

from ..qarray import is_qarray
from ._variables import COLLECTION, named_leaves

# A collection, and attributes of NNX models.
_HOLDERS = (COLLECTION, "_states", "_learned")
WEIGHTS, LEARNED = "weights", "learned"


def partition(variables: Any, *, match: str = "*") -> tuple[Any, Any]:
    """Trainable leaves, and the rest: two trees like `variables`, with `None` for the others.

    Trainable are floating-point arrays that are no part of a QArray and whose path `match` names (a
    shell pattern, as in rules; what belongs to quantization is under `jaxquant/`). `combine` is the
    inverse.

    **Raises:** `ValueError` if `match` names nothing that can be trained: codes have no gradient.

    ```python
    trainable, frozen = jq.partition(qvariables)
    gradients = jax.grad(lambda t: loss(qmodel.apply(jq.combine(t, frozen), x)))(trainable)
    ```
    """
    leaves, tree = jax.tree.flatten(variables, is_leaf=is_qarray)
    paths = [path for path, _, _ in named_leaves(variables)]

    def trained(path: str, leaf: Any) -> bool:
        floating = not is_qarray(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return floating and fnmatch.fnmatchcase(path, match)

    chosen = [trained(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
    if match != "*" and not any(chosen):
        codes = sum(
            is_qarray(leaf) and fnmatch.fnmatchcase(path, match)
            for path, leaf in zip(paths, leaves, strict=True)
        )
        held = f", but {codes} held as codes, which have no gradient" if codes else ""
        raise ValueError(
            f"match={match!r} names no array that can be trained{held}. Train other leaves, or "
            "adapters (jaxquant.add_adapters), or quantize in training (jaxquant.start_training)."
        )
    pairs = list(zip(chosen, leaves, strict=True))
    return (
        jax.tree.unflatten(tree, [leaf if taken else None for taken, leaf in pairs]),
        jax.tree.unflatten(tree, [None if taken else leaf for taken, leaf in pairs]),
    )


def combine(trainable: Any, frozen: Any) -> Any:
    """The tree that `partition` took apart."""
    return jax.tree.map(
        lambda a, b: b if a is None else a,
        trainable,
        frozen,
        is_leaf=lambda x: x is None or is_qarray(x),
    )


def training_labels(tvariables: Any) -> Any:
    """A tree like `tvariables` that says `"learned"` of what estimators learn, else `"weights"`.

    For `optax.multi_transform`, which takes the function itself: learned scales want a learning
    rate of their own, and no weight decay.

    ```python
    optimizer = optax.multi_transform(
        {"weights": optax.adamw(1e-3, weight_decay=0.1), "learned": optax.adam(1e-4)},
        jq.training_labels,
    )
    ```
    """

    def label(keys: Any, _: Any) -> str:
        first = jax.tree_util.keystr(keys[:1], simple=True)
        return LEARNED if first in _HOLDERS else WEIGHTS

    return jax.tree_util.tree_map_with_path(label, tvariables)
