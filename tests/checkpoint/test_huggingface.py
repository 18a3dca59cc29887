"""Hugging Face folders: one file or shards, never pickles, never outside the folder."""

import builtins
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxquant.checkpoint import CheckpointError, fetch_huggingface, open_huggingface

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(4, np.float16),
    "c": np.ones((2, 2), ml_dtypes.bfloat16),
    "ids": np.arange(3, dtype=np.int64),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def _single(folder):
    safetensors.numpy.save_file(ARRAYS, folder / "model.safetensors")
    return folder


def _sharded(folder, **changes):
    for file, names in {"one.safetensors": "ab", "two.safetensors": ["c", "ids"]}.items():
        safetensors.numpy.save_file({name: ARRAYS[name] for name in names}, folder / file)
    weight_map = dict.fromkeys("ab", "one.safetensors")
    weight_map |= dict.fromkeys(["c", "ids"], "two.safetensors")
    text = json.dumps({"weight_map": weight_map | changes})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


@pytest.mark.parametrize("write", [_single, _sharded])
def test_tensors_are_read_in_their_own_dtype(folder, write):
    opened = open_huggingface(write(folder))
    assert set(opened.tensors) == set(ARRAYS)
    for name in "abc":
        lazy = opened.lazy(name)
        assert (lazy.shape, lazy.dtype) == (ARRAYS[name].shape, ARRAYS[name].dtype)
        np.testing.assert_array_equal(lazy.read(), ARRAYS[name])


def test_integers_and_missing_tensors_are_refused(folder):
    opened = open_huggingface(_single(folder))
    with pytest.raises(CheckpointError, match="'ids' is I64, and F64, F32, F16, BF16 can be read"):
        opened.lazy("ids")
    with pytest.raises(CheckpointError, match="no tensor 'z' among its 4"):
        opened.lazy("z")


@pytest.mark.parametrize(
    "outside", ["../one.safetensors", "/one.safetensors", "x/one.safetensors", "..", "", 7, "a\\b"]
)
def test_the_index_may_not_leave_the_folder(folder, outside):
    with pytest.raises(CheckpointError, match="a file beside the index was wanted"):
        open_huggingface(_sharded(folder, a=outside))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": "three.safetensors"}, "three.safetensors is missing"),
        ({"z": "one.safetensors"}, "puts 'z' in one.safetensors, which lacks it"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(folder, changes, message):
    with pytest.raises(CheckpointError, match=message):
        open_huggingface(_sharded(folder, **changes))


def test_an_index_without_a_map_is_refused(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_huggingface(folder)


def test_pickles_are_never_opened(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(CheckpointError, match="only pickles.*never opened"):
        open_huggingface(folder)


def test_a_folder_without_weights_says_so(folder):
    with pytest.raises(CheckpointError, match="should have model.safetensors .* and has neither"):
        open_huggingface(folder)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\xff", '{"a": 1' + "0" * 5000 + "}"])
def test_a_config_that_is_no_json_object_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="config.json"):
        open_huggingface(folder)


def test_a_missing_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="config.json is missing"):
        open_huggingface(_single(tmp_path))


def test_no_folder_is_no_checkpoint_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        open_huggingface(tmp_path / "none")


def test_weights_cut_anywhere_are_refused(folder):
    whole = (_single(folder) / "model.safetensors").read_bytes()
    for length in range(0, len(whole), 7):
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="not a sound safetensors file"):
            open_huggingface(folder)


def test_a_huge_header_length_is_refused(folder):
    path = _single(folder) / "model.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        open_huggingface(folder)


def test_the_hub_needs_its_extra(monkeypatch):
    real = builtins.__import__

    def without_hub(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    with pytest.raises(ImportError, match=r"'org/name' is no local path.*jaxquant\[hub\]"):
        fetch_huggingface("org/name")


@pytest.mark.parametrize("hub_id", ["no-such-org/no-such-model", "not..valid/--name"])
def test_what_the_hub_cannot_give_is_one_clear_error(hub_id):
    pytest.importorskip("huggingface_hub")
    # HF_HUB_OFFLINE is set for all tests: the hub is not asked.
    with pytest.raises(CheckpointError, match="could not be had from the hub") as caught:
        fetch_huggingface(hub_id)
    assert "\n" not in str(caught.value)
