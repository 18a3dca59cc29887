"""The definition of a product with outliers, against NumPy column by column."""

import jax.numpy as jnp
import numpy as np
import pytest
from outlier_products import call_of, CASES
from quantized import values

from jaxquant.ops.outliers._reference import refuses, run
from jaxquant.qarray import quantize_array


@pytest.mark.parametrize("known", [0, 5], ids=["dequantized", "original"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_paper_says(name, known):
    call, case = call_of(name, known=known), CASES[name]
    assert refuses(call) is None
    x, w = np.asarray(call.x).astype(np.float64), values(call.w)
    rest = jnp.where(jnp.abs(call.x) < 6, call.x, 0.0)
    q = quantize_array(rest, call.activations, contracted=case.summed[0], stack=case.batch[0])
    below = values(q)

    def matrices(a, free_first, summed, batch):
        free = [i for i in range(a.ndim) if i not in summed and i not in batch]
        order = [*batch, *free, *summed] if free_first else [*batch, *summed, *free]
        lead = int(np.prod([a.shape[i] for i in batch]))
        k = int(np.prod([a.shape[i] for i in summed]))
        return a.transpose(order).reshape(lead, *((-1, k) if free_first else (k, -1)))

    xs, qs = (matrices(a, True, case.summed[0], case.batch[0]) for a in (x, below))
    ws = matrices(w, False, case.summed[1], case.batch[1])
    want = []
    for i, (x, q, w) in enumerate(zip(xs, qs, ws, strict=True)):
        apart = (np.abs(x) >= 6).any(0)
        assert 0 < apart.sum() < len(apart) / 4
        originals = dict(
            zip(
                np.asarray(call.columns).reshape(len(xs), -1)[i],
                np.asarray(call.originals).reshape(len(xs), known, -1)[i],
                strict=True,
            )
            if known
            else ()
        )
        terms = [
            np.outer(x[:, j], originals.get(j, w[j])) if apart[j] else np.outer(q[:, j], w[j])
            for j in range(x.shape[1])
        ]
        want.append(sum(terms))
    want = np.stack(want)
    got = np.asarray(run(call)).astype(np.float64)
    if case.flipped:
        want = np.swapaxes(want, -1, -2)
    # Sums of k products in float32, in whatever order.
    bound = xs.shape[-1] * 2.0**-23 * (np.abs(xs) @ np.abs(ws)).max()
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=0, atol=bound)
