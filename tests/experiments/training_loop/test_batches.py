import collections

import numpy as np
import pytest
from training_loop import Order, shuffled, TokenWindows


def test_the_order_is_that_of_the_seed():
    """Words of Philox4x64-10 (Salmon et al. 2011), sorted: the same with any NumPy."""
    assert shuffled(8, seed=0, epoch=0).tolist() == WRITTEN_DOWN
    assert shuffled(8, seed=0, epoch=1).tolist() != WRITTEN_DOWN
    assert shuffled(8, seed=1, epoch=0).tolist() != WRITTEN_DOWN


WRITTEN_DOWN = [0, 2, 1, 5, 4, 3, 6, 7]


def test_each_epoch_has_every_example_once():
    order = Order(count=10, batch=4, seed=5)
    seen = [order.at(step) for step in range(5)]
    epochs, chosen = (np.concatenate(part) for part in zip(*seen, strict=True))
    assert epochs.tolist() == [0] * 10 + [1] * 10
    for epoch in (0, 1):
        assert sorted(chosen[epochs == epoch]) == list(range(10))
    assert chosen[:10].tolist() != chosen[10:].tolist()


def test_a_batch_larger_than_the_data_goes_through_it_again():
    _, chosen = Order(count=3, batch=7, seed=0).at(0)
    counts = collections.Counter(chosen.tolist())
    assert sorted(counts.values()) == [2, 2, 3]


def test_windows_are_of_neighbours_and_cut_anew_each_epoch():
    windows = TokenWindows(tokens=np.arange(103, dtype=np.int32), length=10, batch=9, seed=4)
    first, second = windows(0), windows(1)
    for batch in (first, second):
        assert batch.shape == (9, 10) and batch.dtype == np.int32
        assert (np.diff(batch, axis=1) == 1).all()
        assert len(np.unique(batch)) == 90, "a token is in two windows of an epoch"
    assert len(set(first[:, 0] % 10)) == len(set(second[:, 0] % 10)) == 1
    assert len({int(windows(epoch)[0, 0]) % 10 for epoch in range(5)}) > 1
    np.testing.assert_array_equal(windows(1), second)


def test_too_little_data_is_refused():
    with pytest.raises(ValueError, match="has 19 tokens; at least 20"):
        TokenWindows(tokens=np.arange(19), length=10, batch=1, seed=0)
    with pytest.raises(ValueError, match="no examples"):
        Order(count=0, batch=1, seed=0)
