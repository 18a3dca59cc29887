"""By what gradients of learned scales are multiplied."""

import math

import pytest

from jaxquant.numerics import INT2, INT8
from jaxquant.training import LSQ, PACT, StraightThrough
from jaxquant.training._estimators import gradient_scale


@pytest.mark.parametrize(("count", "format", "qp"), [(7, INT2, 1), (576, INT8, 127)])
def test_the_gradient_scale_is_that_of_the_paper(count, format, qp):
    """Esser et al. 2020, section 2.2: `1 / sqrt(N Qp)`."""
    assert gradient_scale(LSQ(), count, format) == pytest.approx(1 / math.sqrt(count * qp))


@pytest.mark.parametrize("estimator", [LSQ(scaled=False), PACT(), StraightThrough()], ids=repr)
def test_others_have_none(estimator):
    assert gradient_scale(estimator, 100, INT8) == 1.0
