"""Schemes: how one array is held. Values, complete at birth."""

import dataclasses
import math

from ..numerics import AbsMax, FLOAT32, Format, MinMax, Range


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How many neighbours share one scale, by the role that an axis plays in the op.

    `None` means the whole axis. Stack axes (scanned layers, experts) never share a scale.
    Where several axes are contracted, a tile counts along their flattened product.
    """

    contracted: int | None
    kept: int | None = 1

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
    stored in; `None` means that code 0 stands for 0.

    **Raises:** `ValueError` for combinations that mean nothing.
    """

    values: Format
    tile: Tile
    scale: Format = FLOAT32
    range: Range = AbsMax()
    zero_point: Format | None = None

    def __post_init__(self) -> None:
        if self.scale.integer or self.scale.bits < 16:
            raise ValueError(
                f"Scales are held as FLOAT32, BFLOAT16 or FLOAT16, not as {self.scale}."
            )
        asymmetric = isinstance(self.range, MinMax)
        if asymmetric != (self.zero_point is not None):
            raise ValueError(
                f"A zero point belongs to the range MinMax and to no other; got "
                f"range={self.range} with zero_point={self.zero_point}. "
                "Give both, or neither."
            )
        if self.zero_point is not None and (
            not self.values.integer
            or not self.zero_point.integer
            or self.zero_point.bits < self.values.bits
        ):
            raise ValueError(
                f"A zero point is a code: values and zero point must be integers, the zero point "
                f"at least as wide; got values={self.values}, zero_point={self.zero_point}."
            )
        if isinstance(self.range, AbsMax) and not self.values.integer:
            if self.range != AbsMax():
                raise ValueError(
                    f"{self.values} is symmetric, so its range has one convention, HIGHEST; "
                    f"got {self.range.convention.name}."
                )

    def __str__(self) -> str:
        def size(tile: int | None) -> str:
            return "all" if tile is None else str(tile)

        match self.tile:
            case Tile(contracted=None, kept=1):
                tile = "channel"
            case Tile(contracted=None, kept=None):
                tile = "tensor"
            case Tile(contracted=g, kept=1):
                tile = f"g{size(g)}"
            case Tile(contracted=c, kept=k):
                tile = f"{size(c)}x{size(k)}"
        zero = "+zero" if self.zero_point else ""
        return f"{self.values.name.lower()}{zero} {tile}"


def tile_shape(
    shape: tuple[int, ...],
    tile: Tile,
    *,
    contracted: tuple[int, ...],
    stack: tuple[int, ...] = (),
) -> tuple[int, ...]:
    """The tile of each axis of an array of `shape`, whose axes play the given roles.

    Axes named in neither `contracted` nor `stack` are kept.

    **Raises:** `ValueError` where tiles do not fill an axis.
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
            sizes[axis] = math.gcd(left, shape[axis]) if left > 1 else 1
            if left > 1 and sizes[axis] not in (left, shape[axis]):
                break
            left //= sizes[axis]
        if left > 1:
            raise ValueError(
                f"Tiles of {wanted} do not fill the {role} axes {tuple(sorted(axes))} of an array "
                f"of shape {shape} ({total} elements). Use a divisor of {total} that splits no "
                "axis raggedly, or None for one tile over all of them."
            )
    return tuple(sizes)
