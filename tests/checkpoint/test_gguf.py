"""Tensors of a GGUF file, dequantized as the package gguf does."""

import gguf
import numpy as np
import pytest

from jaxquant.checkpoint import CheckpointError, open_gguf

ROWS = np.linspace(-1, 1, 8 * 256, dtype=np.float32).reshape(8, 256)
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def _write(path, tensors):
    writer = gguf.GGUFWriter(path, "llama")
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_read_as_the_package_reads_it(kind, tmp_path):
    stored = gguf.quants.quantize(ROWS, gguf.GGMLQuantizationType[kind])
    file = open_gguf(_write(tmp_path / "a.gguf", {"w": (stored, kind), "v": (ROWS, "F32")}))
    lazy = file.lazy("w")
    assert (lazy.shape, lazy.dtype) == (ROWS.shape, np.float32)
    expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(lazy.read(), expected)


def test_a_read_tensor_outlives_its_file(tmp_path):
    path = _write(tmp_path / "a.gguf", {"w": (ROWS, "F32")})
    array = open_gguf(path).lazy("w").read()
    path.write_bytes(b"")
    np.testing.assert_array_equal(array, ROWS)


def test_the_description_says_what_the_numbers_are(tmp_path):
    q8 = gguf.quants.quantize(ROWS, gguf.GGMLQuantizationType.Q8_0)
    norms = {"n": (ROWS[0], "F32")}
    plain = open_gguf(_write(tmp_path / "a.gguf", {"w": (ROWS, "F32")} | norms))
    mixed = open_gguf(_write(tmp_path / "b.gguf", {"w": (q8, "Q8_0")} | norms))
    assert plain.describe() == "F32 GGUF"
    assert mixed.describe() == "dequantized Q8_0 GGUF"


def test_a_missing_tensor_is_named(tmp_path):
    file = open_gguf(_write(tmp_path / "a.gguf", {"w": (ROWS, "F32")}))
    with pytest.raises(CheckpointError, match="no tensor 'v' among its 1"):
        file.lazy("v")


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path):
    file = open_gguf(_write(tmp_path / "a.gguf", {"w": (ROWS.view(np.int32), "I32")}))
    with pytest.raises(CheckpointError, match="'w' is I32, which the package gguf cannot"):
        file.lazy("w").read()


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        open_gguf(tmp_path / "a.gguf")


@pytest.mark.registry
def test_a_real_file_cut_at_twenty_random_places_is_refused(smollm2_gguf, tmp_path):
    size = smollm2_gguf.stat().st_size
    rng = np.random.default_rng(0)
    with smollm2_gguf.open("rb") as file:
        head = file.read(4 << 20)
    path = tmp_path / "cut.gguf"
    for length in (*rng.integers(1, len(head), 10), *rng.integers(len(head), size - 1, 10)):
        path.write_bytes(head[:length])
        with path.open("r+b") as file:
            file.truncate(int(length))  # Beyond the head: a hole, since only its size is read.
        with pytest.raises(CheckpointError, match="cut short"):
            open_gguf(path)
