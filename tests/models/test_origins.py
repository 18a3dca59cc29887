"""Foreign tensors come to lie where the model wants them, and what does not fit is refused."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxquant.checkpoint import CheckpointError, HuggingFaceFolder, LazyArray, TorchFile
from jaxquant.models._origins import (
    _deinterleave,
    CONVOLUTION,
    lazy_leaf,
    lazy_tree,
    open_folder,
    Origin,
    TRANSPOSED,
)


def _stored(array) -> LazyArray:
    return LazyArray(shape=array.shape, dtype=array.dtype, load=lambda: array, name="theirs")


def _leaf(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def test_axes_are_brought_into_our_order():
    matrix = np.arange(6.0).reshape(2, 3)
    leaf = lazy_leaf(_stored(matrix), Origin(name="theirs", axes=TRANSPOSED), _leaf(3, 2), "a file")
    np.testing.assert_array_equal(leaf.read(), matrix.T)
    assert leaf.dtype == np.float32
    # [out, in, height, width] to [height, width, in, out].
    filters = np.arange(120).reshape(5, 4, 3, 2).astype(np.float32)
    origin = Origin(name="theirs", axes=CONVOLUTION)
    ours = lazy_leaf(_stored(filters), origin, _leaf(3, 2, 4, 5), "a file").read()
    assert ours[2, 1, 3, 4] == filters[4, 3, 2, 1] and ours[0, 1, 2, 3] == filters[3, 2, 0, 1]


@pytest.mark.parametrize("shape", [(3, 2, 5, 4), (5, 4, 3, 2), (3, 2, 4)])
def test_another_shape_is_refused(shape):
    filters = np.zeros((5, 4, 3, 2), np.float32)
    origin = Origin(name="theirs", axes=CONVOLUTION if len(shape) == 4 else None)
    with pytest.raises(CheckpointError, match=r"'theirs' has shape \[5, 4, 3, 2\].*sizes want"):
        lazy_leaf(_stored(filters), origin, _leaf(*shape), "a file")


@pytest.mark.parametrize("shape", [(32, 3), (32,)])
def test_pairs_side_by_side_come_to_lie_half_a_head_apart(shape):
    # Row 16 * head + 2 * pair + member of the file is row 16 * head + 8 * member + pair of ours.
    rows = np.arange(np.prod(shape)).reshape(shape)
    ours = _deinterleave(rows, 2)
    for head in range(2):
        for pair in range(8):
            for member in range(2):
                theirs = rows[16 * head + 2 * pair + member]
                np.testing.assert_array_equal(ours[16 * head + 8 * member + pair], theirs)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "some"}))
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    return tmp_path


SHAPES = {"params": {"one": {"kernel": _leaf(3, 2)}}}
ORIGINS = {("params", "one", "kernel"): Origin(name="a", axes=TRANSPOSED)}


def test_a_tree_of_lazy_arrays_has_the_form_of_the_models(folder):
    config, file = open_folder(folder)
    assert config == {"model_type": "some"} and isinstance(file, HuggingFaceFolder)
    tree = lazy_tree(SHAPES, ORIGINS, file, where="a file", unused=lambda name: name == "b")
    assert jax.tree.structure(tree) == jax.tree.structure(SHAPES)
    np.testing.assert_array_equal(tree["params"]["one"]["kernel"].read(), np.ones((3, 2)))


def test_a_tensor_that_nobody_wants_is_refused(folder):
    _, file = open_folder(folder)
    with pytest.raises(CheckpointError, match=r"1 tensors that this architecture.*'b'"):
        lazy_tree(SHAPES, ORIGINS, file, where="a file", unused=lambda name: False)


def test_a_map_that_misses_a_parameter_is_a_bug(folder):
    _, file = open_folder(folder)
    with pytest.raises(AssertionError, match="disagree"):
        lazy_tree(SHAPES, {}, file, where="a file", unused=lambda name: True)


def test_a_pickle_is_read_where_there_are_no_safetensors(folder, golden):
    (folder / "pytorch_model.bin").write_bytes((golden / "torch_zip.pt").read_bytes())
    assert isinstance(open_folder(folder)[1], HuggingFaceFolder)
    (folder / "model.safetensors").unlink()
    config, file = open_folder(folder)
    assert isinstance(file, TorchFile) and config == {"model_type": "some"}
