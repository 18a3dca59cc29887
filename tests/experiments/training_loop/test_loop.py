import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from training_loop import Devices, read_metrics, train, TrainingError

ROOT = pathlib.Path(__file__).parents[3]
TOY = pathlib.Path(__file__).with_name("toy_training.py")
_spec = importlib.util.spec_from_file_location("toy_training", TOY)
assert _spec is not None and _spec.loader is not None
toy_training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy_training)
LOOP, OPTIMIZER, toy = toy_training.LOOP, toy_training.OPTIMIZER, toy_training.toy


def losses(folder: pathlib.Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def arrays(state) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbs: its folder and its last state."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(toy(), LOOP, OPTIMIZER, folder).state


def test_the_loss_falls_and_every_step_is_in_the_metrics(whole):
    folder, state = whole
    found = losses(folder)
    assert len(found) == LOOP.steps == int(state.step)
    assert np.mean(found[-8:]) < 0.8 * np.mean(found[:8])
    assert int(state.carried) == LOOP.steps * LOOP.batch
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "score" in row] == [20, 40]


@pytest.mark.parametrize("stop", [3, 8, 29, 39])
def test_a_run_that_stops_anywhere_goes_on_to_the_same_bits(whole, tmp_path, stop: int):
    folder, state = whole

    def batch(step: int):
        if step == stop:
            raise KeyboardInterrupt
        return toy().batch(step)

    with pytest.raises(KeyboardInterrupt):
        train(toy(batch=batch), LOOP, OPTIMIZER, tmp_path)
    again = train(toy(), LOOP, OPTIMIZER, tmp_path).state
    assert losses(tmp_path) == losses(folder)
    assert arrays(again) == arrays(state)


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_to_the_same_losses(whole, tmp_path):
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'experiments'}"}
    env |= {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, "-W", "ignore", str(TOY), str(tmp_path)]
    file = tmp_path / "metrics.jsonl"
    # Right after lines were written, in the middle of a save, and between them.
    for lines, wait in ((5, 0.0), (16, 0.005), (28, 0.1)):
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
            while len(read_metrics(file)) < lines and process.poll() is None:
                time.sleep(0.001)
            time.sleep(wait)
            assert process.poll() is None, "it ended before it could be killed"
            process.kill()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["ready", "done"], done.stderr
    assert losses(tmp_path) == losses(whole[0])


def test_parts_of_a_batch_give_what_the_batch_gives(whole, tmp_path):
    """Without noise: each part has its own. A mean of 4 means of 4 losses, in float32."""

    def quiet(variables, carried, batch, fixed, key):
        found = jnp.tanh(batch @ variables["in"]) @ variables["out"]
        return jnp.mean((found - jnp.sin(batch.sum(axis=-1, keepdims=True))) ** 2), carried

    for parts in (1, 4):
        loop = msgspec.structs.replace(LOOP, accumulation=parts)
        train(toy(loss=quiet), loop, OPTIMIZER, tmp_path / str(parts))
    one, four = (np.array(losses(tmp_path / str(parts))) for parts in (1, 4))
    # Sums of 16 are off by 16 ulp at most in the first step; 40 steps of Adam, whose updates are
    # ratios, let that grow.
    np.testing.assert_allclose(four[0], one[0], rtol=16 * 2**-23)
    np.testing.assert_allclose(four, one, rtol=1e-3)
    assert (four != one).any(), "the same numbers: parts were not computed apart"


@pytest.mark.parametrize("devices", [Devices(data=4), Devices(fsdp=4), Devices(data=2, fsdp=2)])
def test_four_devices_train_as_one_does(whole, tmp_path, devices: Devices):
    folder, _ = whole
    state = train(toy(), LOOP, OPTIMIZER, tmp_path, devices=devices).state
    one, four = np.array(losses(folder)), np.array(losses(tmp_path))
    np.testing.assert_allclose(four[0], one[0], rtol=16 * 2**-23)
    np.testing.assert_allclose(four, one, rtol=1e-3)
    held = state.variables["in"].addressable_shards[0].data.size
    assert held == state.variables["in"].size // devices.fsdp
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.shape == (16, 256)]
    assert len(moments) == 2
    assert all(x.addressable_shards[0].data.size == x.size // devices.fsdp for x in moments)


def test_a_checkpoint_of_four_devices_is_read_on_one(whole, tmp_path):
    loop = msgspec.structs.replace(LOOP, steps=40)

    def batch(step: int):
        if step == 30:
            raise KeyboardInterrupt
        return toy().batch(step)

    with pytest.raises(KeyboardInterrupt):
        train(toy(batch=batch), loop, OPTIMIZER, tmp_path, devices=Devices(fsdp=4))
    train(toy(), loop, OPTIMIZER, tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(whole[0]), rtol=1e-3)


def poisoned(*steps: int):
    def batch(step: int):
        points = toy().batch(step)
        return np.full_like(points, np.nan) if step in steps else points

    return toy(batch=batch)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_checkpoint(whole, tmp_path):
    with pytest.raises(TrainingError, match=r"loss of step 19 is nan .*/checkpoints/16\.$"):
        train(poisoned(18), LOOP, OPTIMIZER, tmp_path)
    *_, last = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(last) | {"rate": 0} == {
        "step": 19, "loss": None, "norm": None, "rate": 0, "skipped": True
    }  # fmt: skip
    # The checkpoint is good: the run goes on from it.
    train(toy(), LOOP, OPTIMIZER, tmp_path)
    assert losses(tmp_path) == losses(whole[0])


def test_a_step_that_is_skipped_changes_nothing_but_its_number(tmp_path):
    loop = msgspec.structs.replace(LOOP, steps=8, skips=1)
    state = train(poisoned(7), loop, OPTIMIZER, tmp_path / "a").state
    before = train(toy(), msgspec.structs.replace(loop, steps=7), OPTIMIZER, tmp_path / "b").state
    assert int(state.step) == 8
    # Other schedules, by the number of steps, after the warm-up: compared are counts alone.
    assert int(state.carried) == int(before.carried)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.variables))
    with pytest.raises(TrainingError, match="step 7"):
        train(poisoned(4, 6), loop, OPTIMIZER, tmp_path / "c")


def test_variables_that_are_refused_are_not_saved(tmp_path):
    def check(variables):
        if float(variables["out"].sum()) != first:
            raise ValueError("The learned scale of layer 3 is -0.1.")

    first = float(toy().variables["out"].sum())
    with pytest.raises(TrainingError, match=r"-0\.1\. For this run, no checkpoint"):
        train(toy(check=check), LOOP, OPTIMIZER, tmp_path)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


@pytest.mark.parametrize(
    "change",
    [
        {"problem": dataclasses.replace(toy(), identity={"points": 7})},
        {"loop": msgspec.structs.replace(LOOP, seed=1)},
        {"optimizer": msgspec.structs.replace(OPTIMIZER, learning_rate=1.0)},
    ],
    ids=["problem", "loop", "optimizer"],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, change):
    loop = msgspec.structs.replace(LOOP, steps=8)
    train(toy(), loop, OPTIMIZER, tmp_path)
    given = {"problem": toy(), "loop": loop, "optimizer": OPTIMIZER} | change
    given["loop"] = msgspec.structs.replace(given["loop"], steps=8)
    (name,) = change
    with pytest.raises(TrainingError, match=rf"of other settings: {name}\.\w+ is .* there and"):
        train(**given, out=tmp_path)


def test_a_checkpoint_of_other_arrays_is_refused(tmp_path):
    loop = msgspec.structs.replace(LOOP, steps=8)
    train(toy(), loop, OPTIMIZER, tmp_path)
    wider = dict(toy().variables) | {"out": jnp.zeros((256, 2), jnp.float32)}
    with pytest.raises(
        TrainingError, match=r"out is float32\[256, 1\] there and float32\[256, 2\]"
    ):
        train(toy(variables=wider), loop, OPTIMIZER, tmp_path)


def test_reporting_may_change_between(whole, tmp_path):
    loop = msgspec.structs.replace(LOOP, steps=8)
    train(toy(), loop, OPTIMIZER, tmp_path)
    train(toy(), msgspec.structs.replace(loop, log_every=1, keep=1), OPTIMIZER, tmp_path)


def test_more_devices_than_there_are_is_an_error(tmp_path):
    loop = msgspec.structs.replace(LOOP, batch=64)
    with pytest.raises(ValueError, match="want 64 devices and 4 are here"):
        train(toy(), loop, OPTIMIZER, tmp_path, devices=Devices(data=64))
