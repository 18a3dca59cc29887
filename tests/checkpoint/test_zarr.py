"""The Zarr reader reads what Orbax writes, any region of it, and refuses what it does not know."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxquant.checkpoint import CheckpointError
from jaxquant.checkpoint._zarr import empty, ZarrArray

ARRAY = np.arange(7 * 6 * 5, dtype=np.uint16).reshape(7, 6, 5)


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """The array by hand, in chunks that do not divide its axes."""
    folder = tmp_path_factory.mktemp("chunked")
    chunks = (3, 4, 5)
    padded = np.zeros((9, 8, 5), np.uint16)
    padded[:7, :6] = ARRAY
    for i in range(3):
        for j in range(2):
            chunk = padded[3 * i : 3 * i + 3, 4 * j : 4 * j + 4]
            (folder / f"{i}.{j}.0").write_bytes(np.ascontiguousarray(chunk).tobytes())
    meta = {
        "zarr_format": 2,
        "shape": ARRAY.shape,
        "chunks": chunks,
        "dtype": "<u2",
        "compressor": None,
        "fill_value": None,
        "filters": None,
        "order": "C",
    }
    (folder / ".zarray").write_text(json.dumps(meta))
    return folder


def bounds(n: int):
    return st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted)


@hypothesis.given(st.tuples(bounds(7), bounds(6), bounds(5)))
def test_every_region_is_what_slicing_gives(chunked, ends):
    region = tuple(slice(start, stop) for start, stop in ends)
    assert np.array_equal(ZarrArray(chunked).read(region), ARRAY[region])


def test_memory_is_aligned_as_jax_wants_it():
    for shape in [(), (1,), (3, 5), (0, 2)]:
        array = empty(shape, np.dtype(np.float32))
        assert (array.shape, array.dtype) == (shape, np.float32)
        assert array.size == 0 or array.ctypes.data % 64 == 0


def test_what_orbax_cut_into_chunks_is_read_whole(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (2048, 1536), dtype=np.uint8)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        save_args = {"a": ocp.SaveArgs(chunk_byte_size=1 << 20)}
        args = ocp.args.PyTreeSave({"a": array}, save_args=save_args)
        checkpointer.save(tmp_path / "out", args=args)
    assert len(list((tmp_path / "out" / "a").iterdir())) > 2
    read = ZarrArray(tmp_path / "out" / "a").read((slice(0, 2048), slice(0, 1536)))
    assert np.array_equal(read, array)


WRONG = {
    "no metadata": ({}, "holds no Zarr array"),
    "compressed": ({"compressor": {"id": "zstd"}}, "holds no Zarr array"),
    "another format": ({"zarr_format": 3}, "format 2"),
    "another order": ({"order": "F"}, "format 2"),
    "a dtype of nobody": ({"dtype": "<q9"}, "holds no Zarr array"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_it_does_not_know_is_refused(case, chunked, tmp_path):
    changes, words = WRONG[case]
    meta = json.loads((chunked / ".zarray").read_text()) | changes
    (tmp_path / ".zarray").write_text(json.dumps(meta) if changes else "{")
    with pytest.raises(CheckpointError, match=words):
        ZarrArray(tmp_path)


def test_a_chunk_that_is_missing_or_short_is_named(chunked, tmp_path):
    (tmp_path / ".zarray").write_bytes((chunked / ".zarray").read_bytes())
    region = tuple(slice(0, n) for n in ARRAY.shape)
    with pytest.raises(CheckpointError, match=r"0\.0\.0 cannot be read"):
        ZarrArray(tmp_path).read(region)
    (tmp_path / "0.0.0").write_bytes(b"1")
    with pytest.raises(CheckpointError, match=r"0\.0\.0 has 1 bytes, and a chunk has 120"):
        ZarrArray(tmp_path).read(region)
