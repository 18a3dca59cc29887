"""A lazy array reads when asked, checks what it reads, and keeps nothing."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant.checkpoint import CheckpointError, LazyArray, materialize


def _lazy(array, **promises):
    reads = []

    def load():
        reads.append(1)
        return array

    promised = {"shape": array.shape, "dtype": array.dtype, "name": "w"} | promises
    return LazyArray(load=load, **promised), reads


def test_its_size_is_known_without_reading():
    lazy, reads = _lazy(np.ones((2, 3), np.float16))
    assert (lazy.shape, lazy.ndim, lazy.size, lazy.nbytes) == ((2, 3), 2, 6, 12)
    assert repr(lazy) == "LazyArray('w', float16[2, 3])"
    assert not reads


def test_each_read_goes_to_the_file():
    lazy, reads = _lazy(np.arange(6, dtype=np.float32))
    np.testing.assert_array_equal(np.asarray(lazy), lazy.read())
    assert len(reads) == 2
    assert np.asarray(lazy, np.float64).dtype == np.float64


def test_it_cannot_be_had_without_a_copy():
    lazy, _ = _lazy(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(lazy, copy=False)


def test_materialize_replaces_lazy_leaves_and_no_others():
    lazy, _ = _lazy(np.arange(3, dtype=np.float32))
    tree = materialize({"a": lazy, "b": [7, jnp.ones(2)]})
    assert isinstance(tree["a"], jax.Array) and tree["b"][0] == 7
    np.testing.assert_array_equal(tree["a"], [0, 1, 2])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named(dtype, bad):
    array = np.zeros((3, 4), dtype)
    array[1, 2] = bad
    lazy, _ = _lazy(array)
    with pytest.raises(CheckpointError, match=rf"Tensor 'w' holds {bad} at \[1, 2\]"):
        lazy.read()


def test_one_far_into_a_large_array_is_found():
    array = np.zeros((1 << 20) + 5, np.float32)
    array[-1] = np.nan
    lazy, _ = _lazy(array)
    with pytest.raises(CheckpointError, match=r"holds nan at \[1048580\]"):
        lazy.read()


def test_integers_and_empty_arrays_pass():
    for array in (np.arange(3), np.zeros((0, 3), np.float32)):
        np.testing.assert_array_equal(_lazy(array)[0].read(), array)


@pytest.mark.parametrize("promise", [{"shape": (3, 2)}, {"dtype": np.dtype(np.float64)}])
def test_a_broken_promise_is_an_error(promise):
    lazy, _ = _lazy(np.ones((2, 3), np.float32), **promise)
    with pytest.raises(CheckpointError, match="its header promised"):
        lazy.read()
