"""One small run of a recipe with state between steps, killed and gone on with."""

import argparse
import dataclasses
import json
import pathlib

import pytest
from fp8_training import one_run
from fp8_training.settings import CONFIGS

QUICK = CONFIGS / "quick"


def given(out: pathlib.Path, configs: pathlib.Path) -> argparse.Namespace:
    return argparse.Namespace(
        arithmetic="fp8_train_delayed", seed=1, out=out, text=None, configs=configs, cores=None
    )


@pytest.fixture
def short(tmp_path: pathlib.Path) -> pathlib.Path:
    """The quick settings with six steps, of two parts each, saved after every third."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "model.toml").write_text((QUICK / "model.toml").read_text())
    text = (QUICK / "training.toml").read_text().replace("steps = 120", "steps = 6")
    text = text.replace("save_every = 60", "save_every = 3").replace("warmup = 20", "warmup = 2")
    text = text.replace("evaluate_every = 60", "evaluate_every = 6\naccumulation = 2")
    (folder / "training.toml").write_text(text)
    return folder


@pytest.mark.slow
def test_a_run_that_is_gone_on_with_is_the_run_to_the_bit(tmp_path, short, monkeypatch):
    whole = one_run.run(given(tmp_path / "whole", short))
    assert whole["nll"] < 6.3  # Of 512 tokens chance has 6.24, untrained weights more.

    train = one_run.train

    def half(problem, loop, *rest, **named):
        def batch(step):
            if step == 4:
                raise KeyboardInterrupt
            return problem.batch(step)

        return train(dataclasses.replace(problem, batch=batch), loop, *rest, **named)

    monkeypatch.setattr(one_run, "train", half)
    with pytest.raises(KeyboardInterrupt):
        one_run.run(given(tmp_path / "cut", short))
    monkeypatch.setattr(one_run, "train", train)
    again = one_run.run(given(tmp_path / "cut", short))
    assert again["nll_per_window"] == whole["nll_per_window"]
    stored = json.loads((tmp_path / "cut" / "fp8_train_delayed_1" / "row.json").read_text())
    assert stored["nll"] == whole["nll"]
