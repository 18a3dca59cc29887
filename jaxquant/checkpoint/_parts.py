"""A QArray as named parts, and back: what a checkpoint holds of one tensor.

Scales that are held as codes are parts of their own: `scale.codes`, `scale.scale`, ...
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..numerics import decode, Format
from ..qarray import CANONICAL, check_qarray, QArray, Scheme
from ..qarray._qarray import short_tiles
from ._manifest import Part, Tensor
from ._stored import describe, dtype_named

LEAVES = ("codes", "scale", "zero_point", "offset")


def parts_of(q: QArray, prefix: str = "") -> dict[str, Any]:
    """The leaves of `q` by role; those that it does not have are left out."""
    parts: dict[str, Any] = {}
    for name in LEAVES:
        part = getattr(q, name)
        if isinstance(part, QArray):
            parts |= parts_of(part, f"{prefix}{name}.")
        elif part is not None:
            parts[prefix + name] = part
    return parts


def with_parts(shape: QArray, parts: dict[str, Any], prefix: str = "") -> QArray:
    """`shape` with its leaves replaced by those in `parts`."""
    leaves: dict[str, Any] = {}
    for name in LEAVES:
        part = getattr(shape, name)
        if isinstance(part, QArray):
            leaves[name] = with_parts(part, parts, f"{prefix}{name}.")
        elif part is not None:
            leaves[name] = parts[prefix + name]
    return dataclasses.replace(shape, **leaves)


def described(q: QArray, name: str) -> dict[str, Part]:
    """What the manifest says of each part; `name` begins the names of the stored arrays."""
    formats = {"codes": q.scheme.values, "zero_point": q.scheme.zero_point}
    if isinstance(q.scale, QArray):
        formats["scale.codes"] = q.scale.scheme.values
    return {
        role: describe(part, f"{name}.{role}", _bits(formats.get(role)))
        for role, part in parts_of(q).items()
    }


def _bits(format: Format | None) -> int | None:
    """How many bits of each element are stored, where its dtype has more."""
    if format is None or format.storage.name not in ("int8", "uint8") or not format.packs:
        return None
    return format.bits


def table_of(format: Format) -> tuple[float, ...] | None:
    """The value of each code, where codes are not simply numbers of their dtype."""
    if format.table is not None:
        return format.table
    if format.integer or format.native or format.power_of_two:
        return None
    codes = jnp.arange(2**format.bits, dtype=format.storage)
    return tuple(float(v) for v in np.asarray(decode(codes, format, jnp.float32)))


def shape_of(tensor: Tensor, scheme: Scheme) -> QArray:
    """The QArray of shapes that the manifest describes.

    **Raises:** `KeyError`, `TypeError` or `ValueError` if its parts do not fit together.
    """
    if tensor.tile is None:
        raise ValueError("it has a scheme but no tile")
    q = _shape(tensor, scheme, tensor.tile, "", tensor.dtype)
    check_qarray(q)
    return q


def _shape(
    tensor: Tensor, scheme: Scheme, tile: tuple[int, ...], prefix: str, dtype: str
) -> QArray:
    def part(name: str) -> Any:
        found = tensor.parts.get(prefix + name)
        return None if found is None else _struct(found)

    codes = tensor.parts[f"{prefix}codes"]
    scale = part("scale")
    if isinstance(scheme.scale, Scheme):
        if tensor.scale_tile is None:
            raise ValueError("its scales have a scheme but no tile")
        scale = _shape(tensor, scheme.scale, tensor.scale_tile, "scale.", "float32")
    if scale is None or len(tile) != len(codes.shape) or min(tile, default=1) < 1:
        raise ValueError(f"tiles of {tile} for codes of shape {codes.shape}")
    return QArray(
        codes=_struct(codes),
        scale=scale,
        zero_point=part("zero_point"),
        offset=part("offset"),
        scheme=scheme,
        layout=CANONICAL,
        dtype=dtype_named(dtype),
        ragged=short_tiles(codes.shape, tile),
    )


def _struct(part: Part) -> Any:
    return jax.ShapeDtypeStruct(part.shape, dtype_named(part.dtype))
