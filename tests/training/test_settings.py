"""Estimators that do not fit what they are to train are refused, with the reason."""

import pytest

from jaxquant.numerics import E4M3, INT4, INT8, MinMax, UINT8
from jaxquant.qarray import PER_TENSOR, Scheme, Tile
from jaxquant.training import LSQ, LSQPlus, PACT, Training

W = Scheme(values=INT4, tile=Tile(contracted=64))
A = Scheme(values=INT8, tile=PER_TENSOR)
ZERO = Scheme(values=UINT8, tile=PER_TENSOR, zero_point=UINT8, range=MinMax())


@pytest.mark.parametrize(
    ("training", "weights", "activations", "static", "reason"),
    [
        (Training(weights=PACT()), W, None, False, "PACT() is for activations"),
        (Training(activations=LSQ()), W, None, False, "give the rule activations and static=True"),
        (Training(activations=LSQ()), W, A, False, "static=True"),
        (Training(weights=LSQPlus()), W, None, False, "has no zero point"),
        (Training(weights=LSQ()), ZERO, None, False, "LSQPlus does"),
        (
            Training(weights=LSQ()),
            Scheme(values=INT4, tile=Tile(contracted=64), scale=E4M3),
            None,
            False,
            "fewer than 16 bits",
        ),
        (
            Training(weights=LSQ()),
            Scheme(values=INT4, tile=Tile(contracted=64), scale=A),
            None,
            False,
            "one a tile",
        ),
    ],
)
def test_what_does_not_fit(training, weights, activations, static, reason):
    assert reason in (training.check(weights, activations, static) or "")


def test_what_fits():
    assert Training().check(W, A, False) is None
    assert Training(weights=LSQ(), activations=LSQPlus()).check(W, ZERO, True) is None
