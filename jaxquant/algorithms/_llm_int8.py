"""LLM.int8(): the columns of a weight that calibration finds to meet outliers, kept as they are."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..ops import Outliers


def known_outliers(
    w: Float[Array, "*stack n k"], peak: Float[Array, "*stack k"], outliers: Outliers
) -> Mapping[str, Array]:
    """`outlier_columns` `[*stack, m]` and `outlier_weights` `[*stack, m, n]`: state of a site.

    The columns whose largest magnitude reaches the threshold (Dettmers et al. 2022,
    arXiv:2208.07339, section 3.2), in falling order of it, in the dtype of `w`. Slices of a stack
    that have fewer are filled up with `k`, which is no column, and zeros. At least one place is
    kept. The number of columns depends on the values of `peak`: this is no function for `jit`.
    """
    *stack, n, k = w.shape
    found = np.asarray(peak).reshape(-1, k)
    apart = found >= outliers.threshold
    count = max(1, int(apart.sum(axis=-1).max(initial=0)))
    order = np.argsort(-found, axis=-1, kind="stable")[:, :count]
    columns = np.where(np.take_along_axis(apart, order, axis=-1), order, k)
    flat = jnp.asarray(columns.reshape(*stack, count).astype(np.int32))
    rows = jnp.swapaxes(w, -1, -2)
    weights = jnp.take_along_axis(rows, flat[..., None], axis=-2, mode="fill", fill_value=0)
    return {"outlier_columns": flat, "outlier_weights": weights}
