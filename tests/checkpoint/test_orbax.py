"""Orbax writes plain Zarr folders, in sensible pieces, and says so when it cannot."""

import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxquant.checkpoint import _orbax

ARRAYS = {"00000.codes": np.arange(6, dtype=np.uint8).reshape(2, 3), "00001.plain": np.ones(4)}


def test_each_array_is_a_folder_whose_chunk_is_its_bytes(tmp_path):
    _orbax.write_arrays(tmp_path / "0000", ARRAYS)
    assert (tmp_path / "0000" / "00000.codes" / "0.0").read_bytes() == bytes(range(6))
    assert (tmp_path / "0000" / "00001.plain" / "0").read_bytes() == ARRAYS["00001.plain"].tobytes()


def test_orbax_itself_restores_what_was_written(tmp_path):
    _orbax.write_arrays(tmp_path / "0000", ARRAYS)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "0000")
    assert restored.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.array_equal(restored[name], array)


def test_nothing_is_written_to_the_terminal(tmp_path, caplog, capfd):
    _orbax.write_arrays(tmp_path / "0000", ARRAYS)
    assert capfd.readouterr() == ("", "")


# Shapes of bytes, and how large chunks may be.
CHUNKED = [
    ((4096, 4096), 8 << 20),
    ((49152, 576), 8 << 20),
    ((151936, 4096), 8 << 20),
    ((1024, 1024), None),  # small
    ((50261, 768), None),  # a prime number of rows
    ((50257, 768), None),  # 29 x 1733
]


@pytest.mark.parametrize("shape, size", CHUNKED)
def test_large_arrays_are_cut_where_their_axes_divide_well(shape, size):
    array = np.broadcast_to(np.uint8(0), shape)
    assert _orbax.chunk_bytes(array) == size


def test_a_refusal_of_the_operating_system_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        _orbax.write_arrays(tmp_path / "file" / "0000", ARRAYS)
