"""Saves that are killed, or that find no room, leave the checkpoint that was there, or none."""

import os
import pathlib
import subprocess
import sys

import pytest
from quantized_trees import assert_same, linen_tree

from jaxquant.checkpoint import CheckpointError, load, read_manifest, save

ROOT = pathlib.Path(__file__).parents[2]
KILLER = pathlib.Path(__file__).with_name("kill_saves.py")


def run(*arguments: str) -> str:
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'toys'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_a_save_killed_at_any_point_leaves_the_old_checkpoint_or_none(tmp_path):
    assert "done" in run(str(KILLER), str(tmp_path / "out"))


LIMITED = r"""
import resource, sys
from quantized_trees import linen_tree
from jaxquant.checkpoint import CheckpointError, save
tree, plan = linen_tree()
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(sys.argv[1], tree, plan)
    except CheckpointError as error:
        print(error)
"""
# Too little for Orbax's metadata, for an array's, for most arrays, and for the manifest.
LIMITS = ("16", "64", "300", "6000")


@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_without_room_is_a_clear_error_and_changes_nothing(existing, tmp_path):
    folder = tmp_path / "out"
    tree, plan = linen_tree()
    if existing:
        save(folder, tree, plan)
    before = sorted(path.name for path in folder.iterdir()) if existing else None
    messages = run("-c", LIMITED, str(folder), *LIMITS).splitlines()
    assert len(messages) == len(LIMITS)
    for message in messages:
        assert message.startswith(f"{folder} cannot be written: File too large.")
        assert existing == ("The checkpoint that was there is as it was." in message)
    if existing:
        assert sorted(path.name for path in folder.iterdir()) == before
        assert_same(load(folder)[0], tree)
    else:
        assert not folder.exists()


def test_a_target_that_is_no_folder_is_a_clear_error(tmp_path):
    tree, plan = linen_tree()
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(CheckpointError, match=f"{path} cannot be written"):
            save(path, tree, plan)
        with pytest.raises(CheckpointError, match="holds no manifest.json"):
            read_manifest(path)
    assert (tmp_path / "file").read_text() == "mine"
