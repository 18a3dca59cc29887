"""Calibrations that are killed go on to what they would have made undisturbed."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
KILLER = pathlib.Path(__file__).with_name("kill_calibrations.py")


@pytest.mark.slow
def test_calibrations_killed_at_random_moments_go_on_to_the_same_bytes(tmp_path):
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'toys'}"}
    command = [sys.executable, "-W", "ignore", str(KILLER), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "done" in done.stdout, done.stdout + done.stderr
