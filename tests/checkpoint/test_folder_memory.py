"""What saving and loading cost beside the tree, and what the folder costs beside its arrays."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = pathlib.Path(__file__).with_name("measure_memory.py")


def measure(what: str, folder: pathlib.Path) -> dict[str, int]:
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'toys'}",
        "JAX_NUM_CPU_DEVICES": "4",
    }
    command = [sys.executable, "-W", "ignore", str(SCRIPT), what, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, measure("save", folder)


def test_saving_makes_no_second_copy_of_the_tree(saved):
    _, found = saved
    assert found["tree"] > 200e6
    assert found["beyond"] <= 0.5 * found["tree"]


def test_the_folder_is_hardly_larger_than_its_packed_arrays(saved):
    _, found = saved
    assert found["packed"] < 0.8 * found["tree"]
    assert found["files"] <= 1.03 * found["packed"]


@pytest.mark.parametrize("what", ["load", "load sharded"])
def test_loading_makes_no_second_copy_of_the_tree(saved, what):
    folder, _ = saved
    found = measure(what, folder)
    assert found["tree"] > 200e6
    assert found["beyond"] <= 1.35 * found["tree"]
