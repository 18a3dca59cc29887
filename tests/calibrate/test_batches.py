import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.calibrate._batches import checked_batches, token_batches


def test_batches_are_of_one_size_where_the_number_allows_it():
    tokens = np.arange(128 * 4).reshape(128, 4) % 11
    sizes = [batch[0].shape[0] for batch in token_batches(tokens, 11, size=8)]
    assert sizes == [8] * 16
    # 12 has the divisor 6; 13 is prime, and its last batch is short.
    assert [len(b[0]) for b in token_batches(tokens[:12], 11, size=8)] == [6, 6]
    assert [len(b[0]) for b in token_batches(tokens[:13], 11, size=8)] == [8, 5]
    assert [len(b[0]) for b in token_batches(tokens[:3], 11, size=8)] == [3]
    together = np.concatenate([b[0] for b in token_batches(tokens[:13], 11, size=8)])
    np.testing.assert_array_equal(together, tokens[:13])


@pytest.mark.parametrize(
    "tokens, error, words",
    [
        (np.zeros((0, 4), int), ValueError, "shape \\(0, 4\\)"),
        (np.zeros(4, int), ValueError, "shape \\(4,\\)"),
        (np.zeros((2, 4)), TypeError, "float64"),
        (np.array([[0, 1], [2, 11]]), ValueError, "Window 1 .* holds 11 at position 1"),
        (np.array([[0, -1]]), ValueError, "holds -1 at position 1"),
    ],
)
def test_tokens_that_cannot_be_used(tokens, error, words):
    with pytest.raises(error, match=words):
        token_batches(tokens, 11)


def test_batches_that_cannot_be_used():
    with pytest.raises(ValueError, match="no calibration data"):
        checked_batches(iter(()))
    with pytest.raises(TypeError, match="tuple of the call's arguments, not ndarray"):
        checked_batches([np.zeros(3)])
    with pytest.raises(ValueError, match="Batch 1 .* NaN"):
        checked_batches([(jnp.zeros(2),), (jnp.array([1.0, np.nan]),)])
    with pytest.raises(ValueError, match="Batch 0 .* NaN"):
        checked_batches([({"x": jnp.array([np.inf], jnp.bfloat16)},)])
    with pytest.raises(ValueError, match=r"Batch 1 .* shape \(0, 4\), with no values"):
        checked_batches([(jnp.zeros((1, 4)),), (jnp.zeros((0, 4)),)])
    with pytest.raises(ValueError, match="at least 1 window; got size=0"):
        token_batches(np.zeros((1, 4), np.int32), 11, size=0)


def test_an_iterator_is_read_once():
    batches = ((jnp.full(2, float(i)),) for i in range(3))
    assert [float(b[0][0]) for b in checked_batches(batches)] == [0.0, 1.0, 2.0]
