"""Which range rules mean something, and what the refusals say. The numbers are in test_scale.py."""

import pytest

from jaxquant.numerics import (
    AbsMax,
    AbsMean,
    BINARY,
    check_range,
    Convention,
    E2M1,
    E4M3,
    Fixed,
    Format,
    INT1,
    INT4,
    INT8,
    MeanSquaredError,
    MinMax,
    NF4,
    Percentile,
    Range,
    RootMeanSquare,
    SharedExponent,
    TERNARY,
    UINT4,
)

H, M, L, S = Convention.HIGHEST, Convention.MIDDLE, Convention.LOWEST, Convention.SIGNED

# Rule, format, whether there is a zero point.
ALLOWED = [
    (AbsMax(), INT4, False),
    (AbsMax(), UINT4, False),
    (AbsMax(), NF4, False),
    (AbsMax(), BINARY, False),
    (AbsMax(convention=L), INT1, False),
    (AbsMax(convention=S), INT1, False),
    (AbsMax(convention=M), TERNARY, False),
    (MinMax(), INT4, True),
    (MinMax(include_zero=False), UINT4, True),
    (Percentile(percent=100.0), E4M3, False),
    (Percentile(percent=99.9), UINT4, True),
    (Percentile(percent=0.1, convention=L), INT4, False),
    (RootMeanSquare(multiple=4.0), INT8, False),
    (AbsMean(), TERNARY, False),
    (Fixed(low=0.0, high=6.0), UINT4, True),
    (Fixed(low=-1.0, high=0.0), INT8, False),
    (SharedExponent(), E2M1, False),
    (MeanSquaredError(base=AbsMax(convention=S)), INT4, False),
    (MeanSquaredError(base=MinMax(), shrink=1.0, grid=1), INT1, True),
]


@pytest.mark.parametrize("rule, format, zero", ALLOWED)
def test_what_means_something_is_taken(rule: Range, format: Format, zero: bool):
    check_range(rule, format, zero)


BOTH = "zero point belongs to the ranges MinMax, Percentile and Fixed, and MinMax needs one"
REFUSED = [
    (MinMax(), INT4, False, f"{BOTH}; got range=MinMax.* without a zero point. Give both"),
    (AbsMax(), INT4, True, f"{BOTH}; got range=AbsMax.* with a zero point"),
    (RootMeanSquare(multiple=3.0), INT4, True, BOTH),
    (AbsMean(), INT4, True, BOTH),
    (SharedExponent(), INT4, True, BOTH),
    (MeanSquaredError(base=MinMax()), INT4, False, BOTH),
    (MeanSquaredError(base=AbsMax()), INT4, True, BOTH),
    (SharedExponent(), INT8, False, "shared exponent scales floats, not INT8. Use AbsMax"),
    (SharedExponent(), NF4, False, "scales floats, not NF4"),
    (AbsMax(convention=S), E4M3, False, "mean nothing for E4M3; .* one, HIGHEST; got SIGNED"),
    (AbsMax(convention=M), UINT4, False, "mean nothing for UINT4; .* got MIDDLE"),
    (Percentile(percent=99.0, convention=L), NF4, False, "mean nothing for NF4; .* got LOWEST"),
    (MeanSquaredError(base=AbsMax(convention=L)), E2M1, False, "mean nothing for E2M1"),
    (
        AbsMax(),
        INT1,
        False,
        "INT1 has no code above 0 .* SIGNED or LOWEST, a zero point, or .*BINARY",
    ),
    (AbsMean(), INT1, False, "INT1 has no code above 0"),
    (RootMeanSquare(multiple=1.0, convention=S), INT4, False, "SIGNED belongs to AbsMax"),
    (
        Percentile(percent=50.0, convention=S),
        INT4,
        False,
        "SIGNED belongs to AbsMax; got .*Percentile",
    ),
    (Percentile(percent=0.0), INT4, False, "no range: it takes more than 0 and at most 100"),
    (Percentile(percent=100.5), INT4, True, "more than 0 and at most 100"),
    (Percentile(percent=float("nan")), INT4, True, "more than 0 and at most 100"),
    (RootMeanSquare(multiple=0.0), INT4, False, "a multiple above 0"),
    (
        AbsMean(multiple=-1.0),
        TERNARY,
        False,
        "AbsMean.multiple=-1.0. is no range: .* multiple above 0",
    ),
    (Fixed(low=1.0, high=2.0), INT4, False, "low <= 0 <= high, not both 0"),
    (Fixed(low=0.0, high=0.0), INT4, True, "low <= 0 <= high, not both 0"),
    (Fixed(low=-2.0, high=-1.0), INT4, True, "low <= 0 <= high"),
    (MeanSquaredError(base=AbsMax(), grid=0), INT4, False, "grid >= 1, 0 < shrink <= 1"),
    (MeanSquaredError(base=AbsMax(), shrink=0.0), INT4, False, "0 < shrink <= 1 and power > 0"),
    (MeanSquaredError(base=AbsMax(), shrink=1.5), INT4, False, "0 < shrink <= 1"),
    (MeanSquaredError(base=AbsMax(), power=0.0), INT4, False, "power > 0"),
]


@pytest.mark.parametrize("rule, format, zero, message", REFUSED)
def test_what_means_nothing_is_refused(rule: Range, format: Format, zero: bool, message: str):
    with pytest.raises(ValueError, match=message):
        check_range(rule, format, zero)


def test_rules_are_values():
    rules = {rule for rule, _, _ in ALLOWED}
    assert AbsMax() in rules and Percentile(percent=98.0) not in rules
    assert AbsMax() == AbsMax(convention=H) != AbsMax(convention=M)
