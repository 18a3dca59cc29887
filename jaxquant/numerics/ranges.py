"""Every range rule: `jq.ranges.Percentile`. Which reals a tile's codes are spread over."""

from ._range import (
    AbsMax as AbsMax,
    AbsMean as AbsMean,
    Convention as Convention,
    ExponentRule as ExponentRule,
    Fixed as Fixed,
    MeanSquaredError as MeanSquaredError,
    MinMax as MinMax,
    Percentile as Percentile,
    RootMeanSquare as RootMeanSquare,
    SharedExponent as SharedExponent,
)
