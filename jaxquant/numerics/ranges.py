"""Range rules, `jq.ranges.Percentile`: which reals a tile's codes are spread over.

They are values; `_scale` computes with them.
"""

import dataclasses
import enum

from .formats import Format


class Convention(enum.Enum):
    """Which number of a signed integer format meets the end of a tile's range.

    Four conventions are in use for "symmetric int4", and they give different bytes; the numbers
    below are for 4 bits. `algorithms` that must match another library name theirs.
    """

    HIGHEST = "highest"
    """peak / 7: nothing is ever clipped (AutoAWQ, SmoothQuant, ggml Q8_0)."""
    MIDDLE = "middle"
    """peak / 7.5: the largest value is clipped by at most half a gap (GPTQ, compressed-tensors)."""
    LOWEST = "lowest"
    """peak / 8: one more code in use; the largest positive value may be clipped by a whole gap."""
    SIGNED = "signed"
    """signed peak / -8: the largest magnitude is always met, the scale may be negative (Q4_0)."""


class ExponentRule(enum.Enum):
    """How the exponent that a tile shares is taken from its largest magnitude."""

    FLOOR = "floor"
    """That of the magnitude, less the format's largest: what lies above the end of the format is
    clipped, by less than a quarter of it (OCP MX v1.0, section 6.3)."""
    CEIL = "ceil"
    """The least one with which nothing is clipped (`RCEIL` in torchao and Transformer Engine)."""
    EVEN = "even"
    """As `FLOOR`, of the magnitude rounded to as many bits as the format's numbers have: what would
    be clipped by more than half a step takes the next exponent (`EVEN` in torchao; what
    compressed-tensors does)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsMax:
    """The tile's largest magnitude meets the end of the format."""

    convention: Convention = Convention.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinMax:
    """Lowest and highest code meet the tile's smallest and largest value; needs a zero point.

    With `include_zero` the range always reaches 0, so that 0 is exactly representable. Without, it
    may lie apart from it; the zero point is then past the codes, and is clipped to its own format:
    give it a wide one.
    """

    include_zero: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Percentile:
    """The range that holds `percent` of a tile's values, interpolated between neighbours.

    Without a zero point: of its magnitudes. With one: what lies outside is cut in equal parts from
    both ends, and the range reaches 0.
    """

    percent: float
    convention: Convention = Convention.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootMeanSquare:
    """The end of the format meets `multiple` times the root of a tile's mean square."""

    multiple: float
    convention: Convention = Convention.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsMean:
    """The end of the format meets `multiple` times the mean of a tile's magnitudes.

    With `TERNARY` the rule of BitNet b1.58 (arXiv:2402.17764, eq. 1 to 3), with `BINARY` that of
    XNOR-Net (arXiv:1603.05279, section 3.1).
    """

    multiple: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
    """The range `low` to `high`, whatever the values are.

    Without a zero point, the larger magnitude of the two meets the end of the format.
    """

    low: float
    high: float
    convention: Convention = Convention.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedExponent:
    """A power of two, from the largest magnitude's exponent: the scales of OCP MX formats."""

    rule: ExponentRule = ExponentRule.FLOOR


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanSquaredError:
    """The range of `base`, shrunk to where rounding a tile errs least.

    Of the factors `1 - i / grid` for `i < shrink * grid`, the one with the least sum of
    `|error| ** power`; the widest of equals. The defaults are those of GPTQ's `mse=True`.
    """

    base: AbsMax | MinMax
    grid: int = 100
    shrink: float = 0.8
    power: float = 2.4


Range = (
    AbsMax
    | MinMax
    | Percentile
    | RootMeanSquare
    | AbsMean
    | Fixed
    | SharedExponent
    | MeanSquaredError
)


def check_range(rule: Range, values: Format, asymmetric: bool) -> None:
    """Refuses what means nothing.

    **Raises:** `ValueError` with what to do.
    """
    _check_numbers(rule)
    base = rule.base if isinstance(rule, MeanSquaredError) else rule
    needs = isinstance(base, MinMax)
    may = needs or isinstance(base, (Percentile, Fixed))
    if asymmetric and not may or needs and not asymmetric:
        raise ValueError(
            f"A zero point belongs to the ranges MinMax, Percentile and Fixed, and MinMax needs "
            f"one; got range={rule} {'with' if asymmetric else 'without'} a zero point. "
            "Give both, or neither."
        )
    if asymmetric:
        return
    convention = getattr(base, "convention", Convention.HIGHEST)
    if isinstance(base, SharedExponent):
        if values.integer or values.table is not None:
            raise ValueError(f"A shared exponent scales floats, not {values}. Use AbsMax.")
    elif convention is not Convention.HIGHEST and not values.signed:
        raise ValueError(
            f"The conventions of symmetric integers mean nothing for {values}; its range has one, "
            f"HIGHEST; got {convention.name}."
        )
    elif convention is Convention.HIGHEST and values.highest <= 0:
        raise ValueError(
            f"{values} has no code above 0 that could meet the end of a range. Use the convention "
            "SIGNED or LOWEST, a zero point, or the format BINARY."
        )
    if convention is Convention.SIGNED and not isinstance(base, AbsMax):
        raise ValueError(f"The convention SIGNED belongs to AbsMax; got range={rule}.")


def _check_numbers(rule: Range) -> None:
    match rule:
        case Percentile(percent=p):
            wanted = "more than 0 and at most 100" if not 0 < p <= 100 else ""
        case RootMeanSquare(multiple=m) | AbsMean(multiple=m):
            wanted = "a multiple above 0" if not m > 0 else ""
        case Fixed(low=low, high=high):
            wanted = "" if low <= 0 <= high and low != high else "low <= 0 <= high, not both 0"
        case MeanSquaredError(grid=g, shrink=s, power=p):
            wanted = "grid >= 1, 0 < shrink <= 1 and power > 0"
            wanted = "" if g >= 1 and 0 < s <= 1 and p > 0 else wanted
        case _:
            wanted = ""
    if wanted:
        raise ValueError(f"{rule} is no range: it takes {wanted}.")
