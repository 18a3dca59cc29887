"""A calibration that is killed, again and again, goes on to what it would have made undisturbed."""

import json
import pathlib
import random
import subprocess
import sys
import time

import pytest

from jaxquant.calibrate._journal import finished_levels

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "gptq_w4_asym_g64.toml"
KILLS = 3


def start(model, out, tokens, *options):
    command = [sys.executable, "-m", "jaxquant", "quantize", model, out, "--recipe", CONFIG]
    command += ["--calibration", tokens, *options]
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)


def result(folder):
    """Manifest and files, but for times, the random name of the data folder, and their digests."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    data = folder / manifest.pop("data")
    del manifest["sha256"]
    dated = ("_CHECKPOINT_METADATA", "commit_success.txt")
    manifest["files"] = [f for f in manifest["files"] if not f["name"].endswith(dated)]
    return manifest, {f["name"]: (data / f["name"]).read_bytes() for f in manifest["files"]}


@pytest.mark.slow
def test_kill_and_resume_make_the_same_bytes(model, tokens, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "q"
    run = tmp_path / "q.calibration"
    assert start(model, whole, tokens).wait() == 0
    wanted = result(whole)
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    # After so many of the eight levels, and at most a third of a second later.
    for levels in sorted(rng.sample(range(8), KILLS)):
        process = start(model, out, tokens, "--resume")
        while process.poll() is None and (not run.exists() or finished_levels(run) < levels):
            time.sleep(0.002)
        time.sleep(rng.random() / 3)
        process.kill()
        assert process.wait() in (-9, 0), (seed, out.with_suffix(".log").read_text())
    assert start(model, out, tokens, "--resume").wait() == 0, seed
    assert result(out) == wanted, seed
    assert not run.exists()
