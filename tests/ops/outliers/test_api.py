"""The product with outliers as it is called."""

import jax.numpy as jnp
import numpy as np
import pytest
from outlier_products import call_of, INT8

from jaxquant.ops import dot_with_outliers, Outliers

NUMBERS = (((1,), (0,)), ((), ()))


def _arguments(**changes):
    call = call_of("matrix", known=5)
    given = {
        "activations": INT8,
        "outliers": Outliers(),
        "columns": call.columns,
        "originals": call.originals,
    }
    return (call.x, call.w, NUMBERS), given | changes


@pytest.mark.parametrize("backend", [None, "xla", "reference"])
def test_backends_go_by_their_names(backend):
    args, options = _arguments()
    y = dot_with_outliers(*args, **options, backend=backend)
    np.testing.assert_allclose(y, dot_with_outliers(*args, **options), rtol=1e-4, atol=1e-3)
    assert y.dtype == jnp.float32 and y.shape == (6, 8)


def test_operands_that_do_not_fit_are_refused():
    (x, w, numbers), options = _arguments()
    with pytest.raises(ValueError, match="One side is the weight, a QArray"):
        dot_with_outliers(x, x.T, numbers, **options)
    with pytest.raises(ValueError, match="give both, or neither"):
        dot_with_outliers(x, w, numbers, **{**options, "originals": None})
    with pytest.raises(ValueError, match="wanted .5,. and .5, 8."):
        dot_with_outliers(x, w, numbers, **{**options, "originals": jnp.ones((5, 7))})
    with pytest.raises(ValueError, match="no backend named 'fast'"):
        dot_with_outliers(x, w, numbers, **options, backend="fast")
