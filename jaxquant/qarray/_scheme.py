"""Schemes: how one array is held. Values, complete at birth."""

import dataclasses
import math
from typing import Union

from ..numerics import (
    AbsMax,
    BFLOAT16,
    check_range,
    E4M3,
    E5M2,
    E8M0,
    FLOAT16,
    FLOAT32,
    Format,
    Range,
    SharedExponent,
)

SCALE_FORMATS = (FLOAT32, BFLOAT16, FLOAT16, E4M3, E5M2, E8M0)
REAL_ZERO_POINTS = (FLOAT32, BFLOAT16, FLOAT16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How many neighbours share one scale, by the role that an axis plays in the op.

    `None` means the whole axis. Stack axes (scanned layers, experts) never share a scale.
    Where several axes are contracted, a tile counts along their flattened product. With `ragged`
    the last tile along an axis may be shorter than the others; without, such shapes are refused.
    """

    contracted: int | None
    kept: int | None = 1
    ragged: bool = False

    def __post_init__(self) -> None:
        for role in ("contracted", "kept"):
            size = getattr(self, role)
            if size is not None and size < 1:
                raise ValueError(
                    f"A tile holds at least 1 element along its {role} axes, not {size}. "
                    "Use None for the whole axis."
                )


PER_CHANNEL = Tile(contracted=None)
"""One scale per output channel of a weight; the same tile on an activation is one per token."""
PER_TENSOR = Tile(contracted=None, kept=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """Format, tile, scale format and range rule of one array.

    `value = (code - zero_point) * scale`. `zero_point` names the format that zero points are
    stored in; `None` means that code 0 stands for 0. Of an integer format, the zero point is itself
    a code, and 0 is exact; in FLOAT16, BFLOAT16 or FLOAT32 it may lie between two codes (HQQ).

    `scale` is the format that scales are stored in, or a scheme: then the array of scales is itself
    held as codes with scales, tile by tile of tiles. With `centered` the mean of the array (of each
    entry of its stack axes) is taken off before it is rounded, and added to what codes stand for.
    Codes are chosen for the scale as it is stored; `codes_first` chooses them for the scale as it
    was before, as bitsandbytes does.

    **Raises:** `ValueError` for combinations that mean nothing.
    """

    values: Format
    tile: Tile
    scale: Union[Format, "Scheme"] = FLOAT32
    range: Range = AbsMax()
    zero_point: Format | None = None
    centered: bool = False
    codes_first: bool = False

    def __post_init__(self) -> None:
        self._check_scale()
        if self.values.power_of_two:
            raise ValueError(
                f"{self.values} has no zero and no sign: it is for scales, not values."
            )
        check_range(self.range, self.values, self.zero_point is not None)
        zero = self.zero_point
        if zero is None:
            return
        wide_code = zero.integer and zero.bits >= self.values.bits
        if not self.values.integer or not (wide_code or zero in REAL_ZERO_POINTS):
            names = ", ".join(map(str, REAL_ZERO_POINTS))
            raise ValueError(
                f"A zero point is a code: values and zero point must be integers, the zero point "
                f"at least as wide; or it lies between codes, and is held as {names}; got "
                f"values={self.values}, zero_point={zero}."
            )

    @property
    def real_zero_point(self) -> bool:
        """Whether zero points may lie between two codes."""
        return self.zero_point is not None and not self.zero_point.integer

    def _check_scale(self) -> None:
        if isinstance(self.scale, Scheme):
            if isinstance(self.scale.scale, Scheme) or self.scale.zero_point is not None:
                raise ValueError(
                    "Scales are held in one more level, without zero points; got "
                    f"scale={self.scale}. Use `centered` to take their mean off."
                )
        elif self.scale not in SCALE_FORMATS:
            names = ", ".join(map(str, SCALE_FORMATS))
            raise ValueError(
                f"Scales are held as {names}, or by a scheme of their own, not as {self.scale}."
            )
        elif self.scale.power_of_two and not isinstance(self.range, SharedExponent):
            raise ValueError(
                f"Scales in {self.scale} are powers of two, which the range SharedExponent gives; "
                f"got range={self.range}."
            )

    def __str__(self) -> str:
        zero = "+zero" if self.zero_point else ""
        if self.real_zero_point:
            zero = f"+{str(self.zero_point).lower()} zero"
        text = f"{self.values.name.lower()}{zero} {_tile_text(self.tile)}"
        if isinstance(self.scale, Scheme):
            return f"{text}, scales {self.scale}"
        return text if self.scale.bits > 8 else f"{text}, scales {self.scale.name.lower()}"


def _tile_text(tile: Tile) -> str:
    def size(tile: int | None) -> str:
        return "all" if tile is None else str(tile)

    match tile:
        case Tile(contracted=None, kept=1):
            return "channel"
        case Tile(contracted=None, kept=None):
            return "tensor"
        case Tile(contracted=g, kept=1):
            return f"g{size(g)}"
        case Tile(contracted=c, kept=k):
            return f"{size(c)}x{size(k)}"


def tile_shape(
    shape: tuple[int, ...],
    tile: Tile,
    *,
    contracted: tuple[int, ...],
    stack: tuple[int, ...] = (),
) -> tuple[int, ...]:
    """The tile of each axis of an array of `shape`, whose axes play the given roles.

    Axes named in neither `contracted` nor `stack` are kept. A ragged tile ends at the end of an
    axis; along several axes of one role, it is as many of the last ones as it holds whole.

    **Raises:** `ValueError` where tiles do not fill an axis and may not be ragged.
    """
    kept = tuple(a for a in range(len(shape)) if a not in contracted and a not in stack)
    sizes = [1] * len(shape)
    for axes, wanted, role in (
        (contracted, tile.contracted, "contracted"),
        (kept, tile.kept, "kept"),
    ):
        total = math.prod(shape[a] for a in axes)
        left = total if wanted is None else wanted
        for axis in sorted(axes, reverse=True):
            if tile.ragged:
                sizes[axis] = max(1, min(left, shape[axis]))
                left = left // sizes[axis] if sizes[axis] == shape[axis] else 1
                continue
            sizes[axis] = math.gcd(left, shape[axis]) if left > 1 else 1
            if left > 1 and sizes[axis] not in (left, shape[axis]):
                break
            left //= sizes[axis]
        if left > 1 and not tile.ragged:
            raise ValueError(
                f"Tiles of {wanted} do not fill the {role} axes {tuple(sorted(axes))} of an array "
                f"of shape {shape} ({total} elements). Use a divisor of {total} that splits no "
                "axis raggedly, None for one tile over all of them, or Tile(..., ragged=True)."
            )
    return tuple(sizes)
