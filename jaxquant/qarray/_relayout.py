"""From one layout to another: what `prepare` does to each leaf, once."""

import dataclasses

import jax.numpy as jnp

from ..numerics import pack
from ._layout import inverse, Layout
from ._qarray import QArray, stored_codes, with_plain_scale


def relayout(q: QArray, layout: Layout) -> QArray:
    """The same QArray with its codes stored as `layout` says.

    **Raises:** `ValueError` if a packed layout does not fit the format or the last stored axis.

    Scales that are held as codes become float32 where their order changes.
    """
    if layout == q.layout:
        return q
    if layout.order != q.layout.order:
        q = with_plain_scale(q)
    logical = inverse(q.layout.permutation(q.ndim))
    wanted = layout.permutation(q.ndim)
    move = tuple(logical[a] for a in wanted)
    codes = jnp.transpose(stored_codes(q), move)
    if layout.packed is not None:
        codes = pack(codes, q.scheme.values, layout.packed)
    elif layout.wide:
        if not q.scheme.values.integer or q.scheme.values.highest > 127:
            raise ValueError(
                f"Wide codes are integers that fit int8; this array holds {q.scheme.values}."
            )
        codes = codes.astype(jnp.int8)
    else:
        codes = codes.astype(q.scheme.values.storage)
    short = {axis + q.ndim: tile for axis, tile in q.ragged}
    parts = {"scale": q.scale, "zero_point": q.zero_point, "offset": q.offset}
    if move != tuple(range(q.ndim)):
        parts = {k: None if p is None else jnp.transpose(p, move) for k, p in parts.items()}
    ragged = tuple((i - q.ndim, short[a]) for i, a in enumerate(move) if a in short)
    return dataclasses.replace(q, codes=codes, layout=layout, ragged=ragged, **parts)
