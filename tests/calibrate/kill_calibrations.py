"""Kills calibrations (AWQ, then GPTQ) at random moments; run by test_journal_killed.py.

    python tests/calibrate/kill_calibrations.py FOLDER [SEED]

A process that is left alone says how long it takes from its first batch to the checkpoint. Others
are killed at a moment of that time, each going on from what the one before left, until three were;
then one is left alone, and its checkpoint is compared.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from flax import nnx
from tiny_configs import LLAMA

import jaxquant as jq
from jaxquant.algorithms import AWQ, GPTQ, Order
from jaxquant.calibrate import calibrate, Settings, token_batches
from jaxquant.models import Llama

KILLS = 3
INT4_G8 = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=8), scale=jq.BFLOAT16)
RECIPE = jq.Recipe(
    name="awq_gptq",
    rules=(
        jq.Rule(match="*embed*"),
        jq.Rule(
            match="*", weights=INT4_G8, scaling=AWQ(ratios=4), algorithm=GPTQ(order=Order.STATIC)
        ),
    ),
)


def calibrated(folder: pathlib.Path) -> None:
    """What is killed: from the model to a checkpoint, going on where an earlier process stopped."""
    model = Llama(LLAMA, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (12, 16))
    batches = token_batches(tokens, LLAMA.vocab_size, size=4)
    variables = nnx.state(model)
    plan = jq.plan(model, variables, *batches[0], recipe=RECIPE)
    print("ready", flush=True)
    made = calibrate(
        model,
        variables,
        batches,
        plan,
        out=folder / "run",
        resume=True,
        # Activations in files, so that there are some to be killed in.
        settings=Settings(memory=0),
    )
    jq.save(folder / "out", made.qvariables, plan, account=made.account)


def started(folder: pathlib.Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", __file__, "child", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def result(folder: pathlib.Path) -> tuple[list[bytes], dict]:
    """Every array, and the manifest but for the random name of its data folder and its files.

    Files are of the arrays that are compared; two among them hold the time.
    """
    qvariables, _ = jq.load(folder / "out")
    manifest = json.loads((folder / "out" / "manifest.json").read_bytes())
    for name in ("data", "files", "sha256"):
        del manifest[name]
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(qvariables)], manifest


def main(folder: pathlib.Path, seed: int) -> None:
    rng = random.Random(seed)
    print(f"seed {seed}", flush=True)
    process = started(folder / "whole")
    start = time.perf_counter()
    assert process.wait() == 0
    whole = time.perf_counter() - start
    wanted, killed = result(folder / "whole"), []
    while len(killed) < KILLS:
        process, moment = started(folder / "killed"), rng.random() * whole
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            # What was left to do took less: once more from the start.
            shutil.rmtree(folder / "killed")
            continue
        assert process.returncode == -signal.SIGKILL, process.returncode
        run = folder / "killed" / "run"
        killed.append(len([x for x in os.listdir(run) if "level" in x]) if run.exists() else None)
    process = started(folder / "killed")
    assert process.wait() == 0
    arrays, manifest = result(folder / "killed")
    assert arrays == wanted[0], seed
    assert manifest == wanted[1], seed
    assert not (folder / "killed" / "run").exists()
    print(f"killed with {killed} levels done, of {4 * LLAMA.layers}; {whole:.0f} s undisturbed")
    print("done")


if __name__ == "__main__":
    if sys.argv[1] == "child":
        calibrated(pathlib.Path(sys.argv[2]))
    else:
        main(pathlib.Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else random.randrange(99))
