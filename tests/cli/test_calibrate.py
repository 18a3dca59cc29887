"""What `--calibration` does beside rounding: the first windows, the run folder, going on."""

import argparse
import json
import pathlib

import numpy as np
import pytest
import tiny_llama

import jaxquant.cli._calibrate as cli
from jaxquant import recipes
from jaxquant.calibrate import Calibrated
from jaxquant.checkpoint import load, read_manifest
from jaxquant.cli._calibrate import read_ids, run_folder, site_rows, summary
from jaxquant.cli._quantize import plan_for
from jaxquant.intercept import Account
from jaxquant.models import open_model

# Two levels, each of one site, and little to compile.
SMALL = """
name = "small"
[[rules]]
match = "layers/?/attention/q/kernel"
weights = { values = "int3", contracted = 32 }
algorithm = "gptq"
[[rules]]
match = "*"
leave = true
"""


@pytest.fixture
def small(tmp_path) -> pathlib.Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def given(**changed):
    names = ("calibration", "windows", "length", "batch", "forward")
    return argparse.Namespace(**dict.fromkeys(names), resume=False, **changed)


def arrays(folder):
    """Digests of all files but those in which Orbax notes when it wrote."""
    dated = ("_CHECKPOINT_METADATA", "commit_success.txt")
    files = read_manifest(folder).files
    return {file.name: file.sha256 for file in files if not file.name.endswith(dated)}


def test_the_run_folder_lies_beside_the_result():
    assert run_folder(pathlib.Path("out/q")) == pathlib.Path("out/q.calibration")
    assert run_folder(pathlib.Path("q.w4/")) == pathlib.Path("q.w4.calibration")
    here = pathlib.Path.cwd()
    assert run_folder(pathlib.Path(".")) == here.with_name(f"{here.name}.calibration")


def test_the_first_windows_are_read_before_the_model(tmp_path):
    path = tiny_llama.write_tokens(tmp_path / "t.npz", windows=5, length=8)
    arguments = given()
    assert read_ids(arguments) is None
    arguments.calibration = tmp_path / "a.txt"
    assert read_ids(arguments) is None
    arguments.calibration = path
    assert read_ids(arguments).shape == (5, 8)
    arguments.windows = 2
    with np.load(path) as held:
        np.testing.assert_array_equal(read_ids(arguments), held["tokens"][:2])
    arguments.windows = 6
    with pytest.raises(ValueError, match="--windows 6 is more than the 5 windows of 8 tokens"):
        read_ids(arguments)
    arguments.length = 8
    with pytest.raises(ValueError, match="--length cuts text .* holds windows of 8 tokens"):
        read_ids(arguments)


def test_what_was_not_scaled_is_named_with_its_reason(model):
    opened = open_model(model)
    plan = plan_for(opened, recipes.SMOOTHQUANT_W8A8)
    left = "layers/0/attention/o/kernel"
    made = Calibrated(qvariables=None, account=Account(plan=plan), sites=(), unscaled=(left,))
    rows = site_rows(made)
    notes = {site: row["notes"] for site, row in rows.items() if row["notes"]}
    assert notes == {
        f"{left}#dot": ["its input is not scaled: nothing makes it in proportion"],
    }
    assert summary(made) == [f"1 inputs not scaled, since nothing makes them in proportion: {left}"]


@pytest.fixture
def stopped(jaxquant, monkeypatch, model, small, tokens, tmp_path):
    """Runs a calibration that is interrupted at the first site of `level`."""

    def run(level: int, *options: object):
        table = cli.live_table

        def stops():
            class Stops:
                def __enter__(self):
                    self.own = table()
                    told = self.own.__enter__()

                    def stop(row, at, levels):
                        if at == level:
                            raise KeyboardInterrupt
                        told(row, at, levels)

                    return stop

                def __exit__(self, *exception):
                    return self.own.__exit__(*exception)

            return Stops()

        monkeypatch.setattr(cli, "live_table", stops)
        ran = jaxquant(*command(model, small, tokens, tmp_path / "q"), *options)
        monkeypatch.setattr(cli, "live_table", table)
        return ran

    return run


def command(model, recipe, tokens, out):
    return "quantize", model, out, "--recipe", recipe, "--calibration", tokens


def test_what_was_interrupted_goes_on_to_the_same_bytes(
    jaxquant, stopped, model, small, tokens, tmp_path
):
    out, run = tmp_path / "q", tmp_path / "q.calibration"
    whole = command(model, small, tokens, tmp_path / "whole")
    assert jaxquant(*whole, "--json", tmp_path / "whole.json").code == 0
    ran = stopped(2)
    assert ran.code == 130
    said = f"jaxquant: interrupted; finished levels (1) are kept in {run}"
    assert ran.err == f"{said}; the same command with --resume goes on from there\n"
    assert run.is_dir() and not out.exists()
    # Without --resume, or with other data, nothing is touched.
    before = sorted(run.iterdir())
    again = jaxquant(*command(model, small, tokens, out))
    assert again.code == 2 and "unfinished calibration" in again.err and "--resume" in again.err
    other = jaxquant(*command(model, small, tokens, out), "--resume", "--windows", 1)
    assert other.code == 2 and "other data" in other.err
    narrow = jaxquant(*command(model, small, tokens, out), "--resume", "--forward", "bfloat16")
    assert narrow.code == 2 and "other settings" in narrow.err
    assert sorted(run.iterdir()) == before
    # What was spilled by the one that was killed does not stay.
    (run / "activations-dead").mkdir()
    resumed = jaxquant(
        *command(model, small, tokens, out), "--resume", "--json", tmp_path / "q.json"
    )
    assert resumed.code == 0 and not run.exists()
    first, _, line, *_ = resumed.out.splitlines()
    assert first == "levels 1 to 1 were done before" and line.startswith("layers/1 ")
    assert arrays(out) == arrays(tmp_path / "whole")
    assert load(out)[1] == load(tmp_path / "whole")[1]
    rows = [json.loads((tmp_path / name).read_text())["sites"] for name in ("q.json", "whole.json")]
    for row in (row for own in rows for row in own):
        row.pop("seconds", None)
    assert rows[0] == rows[1]


def test_an_interrupt_before_anything_is_finished_leaves_nothing(stopped, tmp_path):
    ran = stopped(1)
    assert (ran.code, ran.err) == (130, "jaxquant: interrupted\n")
    assert not (tmp_path / "q.calibration").exists()


def test_resume_where_nothing_was_begun_begins(jaxquant, model, small, tokens, tmp_path):
    ran = jaxquant(*command(model, small, tokens, tmp_path / "q"), "--resume")
    assert ran.code == 0 and len([x for x in ran.out.splitlines() if "attention/q" in x]) > 2


def test_a_folder_of_someone_elses_is_left_alone(jaxquant, model, small, tokens, tmp_path):
    run = tmp_path / "q.calibration"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    for options in ((), ("--resume",)):
        ran = jaxquant(*command(model, small, tokens, tmp_path / "q"), *options)
        assert ran.code == 2 and "holds no calibration" in ran.err
    assert (run / "notes.txt").read_text() == "mine"
