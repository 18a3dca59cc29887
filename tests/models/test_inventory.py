"""Bytes and bits of tensors: each kind of file by hand, a quantized tree by its plan."""

import ml_dtypes
import numpy as np
import pytest
import tiny_llama
from flax import nnx

from jaxquant import recipes
from jaxquant.algorithms import quantize
from jaxquant.calibrate import calibrate
from jaxquant.checkpoint import CheckpointError, open_gguf, open_huggingface, save
from jaxquant.intercept import plan as make_plan
from jaxquant.models import open_model, variables_inventory
from jaxquant.models._inventory import (
    checkpoint_inventory,
    gguf_inventory,
    huggingface_inventory,
    Inventory,
    TensorSize,
)

# All that need no data, and of the others, which take seconds, the narrowest and one with state.
NAMES = [n for n, r in recipes.NAMED.items() if not any(x.algorithm or x.scaling for x in r.rules)]
# The tiny model is 64 wide.
NAMES.remove("w4a16_g128")
NAMES += ["hqq_w4_g64", "gptq_w2_asym_g64", "smoothquant_w8a8_static"]


def test_sums_by_hand():
    a = TensorSize(path="a", shape=(4, 16), scheme="int4 g16", bytes=32 + 8)
    b = TensorSize(path="b", shape=(8,), scheme="float32", bytes=32)
    assert (a.parameters, a.bits_per_value, b.bits_per_value) == (64, 5.0, 32.0)
    both = Inventory(tensors=(a, b))
    assert (both.bytes, both.parameters, both.bits_per_weight) == (72, 72, 8.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_hugging_face_folder_holds_what_was_written(tmp_path, dtype):
    arrays = {name: array.astype(dtype) for name, array in tiny_llama.weights().items()}
    folder = tiny_llama.write_folder(tmp_path / "model", arrays=arrays)
    inventory = huggingface_inventory(open_huggingface(folder))
    assert {t.path: (t.shape, t.bytes) for t in inventory.tensors} == {
        name: (array.shape, array.nbytes) for name, array in arrays.items()
    }


def test_a_gguf_file_holds_what_was_written(tmp_path):
    inventory = gguf_inventory(open_gguf(tiny_llama.write_gguf(tmp_path / "model.gguf")))
    expected = tiny_llama.weights().values()
    assert inventory.bytes == sum(array.nbytes for array in expected)
    assert inventory.parameters == sum(array.size for array in expected)


@pytest.mark.parametrize("name", NAMES)
def test_trees_and_checkpoints_take_what_the_plan_says(tmp_path, name):
    opened = open_model(tiny_llama.write_folder(tmp_path / "model"))
    tokens = np.zeros((1, 4), np.int32)
    plan = make_plan(opened.model, nnx.state(opened.model), tokens, recipe=recipes.NAMED[name])
    if plan.needs_calibration:
        made = calibrate(opened.model, opened.variables, [(tokens,)], plan)
        qvariables, account = made.qvariables, made.account
    else:
        qvariables, account = quantize(opened.variables, plan, account=True)
    save(tmp_path / "q", qvariables, plan, account=account)
    in_memory = variables_inventory(qvariables, account)
    on_disk = checkpoint_inventory(tmp_path / "q")
    assert all((t.sqnr_db is None) == (t.path not in account.by_path) for t in on_disk.tensors)
    assert in_memory.bytes == plan.bytes_after
    assert sorted(in_memory.tensors, key=repr) == sorted(on_disk.tensors, key=repr)


def test_a_damaged_checkpoint_is_not_counted(tmp_path):
    opened = open_model(tiny_llama.write_folder(tmp_path / "model"))
    tokens = np.zeros((1, 4), np.int32)
    plan = make_plan(opened.model, nnx.state(opened.model), tokens, recipe=recipes.W8A16)
    manifest = save(tmp_path / "q", quantize(opened.variables, plan), plan)
    largest = max(manifest.files, key=lambda file: file.bytes)
    (tmp_path / "q" / manifest.data / largest.name).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint_inventory(tmp_path / "q")
