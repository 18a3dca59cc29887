import resource

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.calibrate._store import Store


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_what_does_not_fit_goes_to_a_file_and_comes_back(tmp_path, dtype):
    arrays = [jnp.arange(10).reshape(2, 5).astype(dtype) + i for i in range(4)]
    size = arrays[0].nbytes
    with Store(2 * size, tmp_path) as store:
        for i, array in enumerate(arrays):
            store.put(7, i, array)
        assert (store.held, store.spilled) == (2 * size, 2 * size)
        assert len(list(tmp_path.glob("*/*"))) == 2
        for i, array in enumerate(arrays):
            back = store.get(7, i)
            assert back.dtype == array.dtype
            np.testing.assert_array_equal(back, array)
        for i in range(4):
            store.drop(7, i)
        assert store.held == 0
        assert not list(tmp_path.glob("*/*"))
    assert not list(tmp_path.iterdir())


def test_files_are_gone_after_an_error(tmp_path):
    with pytest.raises(KeyError), Store(0, tmp_path) as store:
        store.put(0, 0, jnp.zeros(3))
        store.get(0, 1)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError), Store(0, file / "folder") as store:
        store.put(0, 0, jnp.zeros(3))


def test_a_disk_without_room_for_the_last_bytes_is_an_error(tmp_path):
    """Which NumPy does not tell of: they are written when the file is closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    values = jnp.zeros(30)
    with Store(0, tmp_path) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(OSError, match="holds 100 bytes of 120: is the disk full"):
                store.put(0, 0, values)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
