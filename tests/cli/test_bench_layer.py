"""The one-row product: all sides compute the same, to their precision."""

import numpy as np

from jaxquant.cli._bench_layer import layer_sides


def test_all_sides_compute_the_same_product():
    sides = layer_sides((128, 192))
    assert list(sides) == ["float32", "w8a16", "int4 g64, 1 a byte", "int4 g64, 2 a byte"]
    products = {name: np.asarray(run()) for name, run in sides.items()}
    exact = products["float32"]
    assert exact.shape == (1, 192)
    for name, bound in (("w8a16", 0.02), ("int4 g64, 1 a byte", 0.25)):
        assert np.linalg.norm(products[name] - exact) < bound * np.linalg.norm(exact)
    packed, bytewise = products["int4 g64, 2 a byte"], products["int4 g64, 1 a byte"]
    # The same codes and scales: only the order of float32 sums may differ.
    np.testing.assert_allclose(packed, bytewise, rtol=1e-4, atol=1e-5)
