"""Outliers as values."""

import math

import pytest

from jaxquant.ops import Outliers, OutlierWeights


def test_they_are_as_in_the_paper_unless_said_otherwise():
    assert Outliers() == Outliers(threshold=6.0, weights=OutlierWeights.DEQUANTIZED, columns=None)
    assert Outliers(threshold=math.inf) != Outliers(threshold=0.0)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"threshold": -0.5}, "threshold=-0.5 is none"),
        ({"threshold": math.nan}, "threshold=nan is none"),
        ({"columns": 0}, "columns=0 leaves no room"),
    ],
)
def test_what_means_nothing_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Outliers(**fields)
