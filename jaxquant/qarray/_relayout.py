"""From one layout to another: what `prepare` does to each leaf, once."""

import dataclasses

import jax.numpy as jnp

from ..numerics import pack
from ._layout import inverse, Layout
from ._qarray import QArray, stored_codes


def relayout(q: QArray, layout: Layout) -> QArray:
    """The same QArray with its codes stored as `layout` says.

    **Raises:** `ValueError` if a packed layout does not fit the format or the last stored axis.
    """
    if layout == q.layout:
        return q
    logical = inverse(q.layout.permutation(q.ndim))
    wanted = layout.permutation(q.ndim)
    move = tuple(logical[a] for a in wanted)
    codes = jnp.transpose(stored_codes(q), move)
    if layout.packed is not None:
        if q.scheme.values.bits != 4 or not q.scheme.values.integer:
            raise ValueError(
                f"Two codes a byte need a 4-bit integer format; this array holds {q.scheme.values}."
            )
        codes = pack(codes, layout.packed)
    elif layout.wide:
        if not q.scheme.values.integer:
            raise ValueError(f"Wide codes are integers; this array holds {q.scheme.values}.")
        codes = codes.astype(jnp.int8)
    else:
        codes = codes.astype(q.scheme.values.storage)
    zero = None if q.zero_point is None else jnp.transpose(q.zero_point, move)
    return dataclasses.replace(
        q, codes=codes, scale=jnp.transpose(q.scale, move), zero_point=zero, layout=layout
    )
