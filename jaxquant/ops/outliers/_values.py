"""What is kept apart from a rounded product: values, complete at birth."""

import dataclasses
import enum
import math


class OutlierWeights(enum.Enum):
    """Which weights the columns that are kept apart are multiplied with."""

    DEQUANTIZED = "dequantized"
    """What their codes stand for, as bitsandbytes has it. Needs no data and no memory."""
    ORIGINAL = "original"
    """As they were, for columns that calibration found, as in the paper; else dequantized."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outliers:
    """LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339, section 3.2).

    A column of activations in which some row reaches `threshold` is multiplied in floats; the
    others are rounded, by scales of which no such element is a part.

    With `columns` at most so many are gathered for the product in floats; where a call has more of
    them, or batch axes, all columns take part in it, masked, as without. Results are the same but
    for the order of a sum.

    **Raises:** `ValueError` for a threshold below 0 or NaN, or no columns.
    """

    threshold: float = 6.0
    weights: OutlierWeights = OutlierWeights.DEQUANTIZED
    columns: int | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.threshold) or self.threshold < 0:
            raise ValueError(
                f"Outliers reach a magnitude; threshold={self.threshold} is none. Give 6.0, or "
                "math.inf for no outliers."
            )
        if self.columns is not None and self.columns < 1:
            raise ValueError(
                f"columns={self.columns} leaves no room for outliers. Give at least 1, or None for "
                "a product of all columns, masked."
            )
