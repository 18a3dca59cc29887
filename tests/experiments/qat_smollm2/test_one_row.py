"""The rows of the experiment on a random Llama of two layers, a few steps each."""

import dataclasses
import json

import jax
import msgspec
import numpy as np
import pytest
import tiny_llama
from qat_smollm2.one_row import calibrated, Given, named_run, trained, write
from qat_smollm2.rows import MADE
from qat_smollm2.subject import make_subject, with_scales_of

import jaxquant as jq
from jaxquant.models import open_model

STEPS = 6


@pytest.fixture(autouse=True)
def _promotion():
    """As the commands have it."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Given:
    folder = tmp_path_factory.mktemp("qat_smollm2")
    rng = np.random.default_rng(0)
    # Few tokens, so that there is something to learn in a few steps.
    tokens = rng.integers(0, 8, (12, 32)).astype(np.int32)
    return Given(
        opened=open_model(tiny_llama.write_folder(folder / "model")),
        train=tokens[:9],
        evaluation=tokens[9:],
        runs=folder / "runs",
    )


def shortened(name: str):
    named = named_run(name, quick=False, steps=STEPS)
    optimizer = msgspec.structs.replace(named.run.optimizer, learning_rate=3e-3)
    loop = msgspec.structs.replace(named.run.loop, log_every=1)
    run = msgspec.structs.replace(named.run, optimizer=optimizer, loop=loop, distillation=0.5)
    return dataclasses.replace(named, run=run)


@pytest.mark.slow
def test_integer_sites_give_the_same_bits_in_training_and_after(given):
    row = trained(shortened("w4a8_qat"), given)
    assert len(row["sites"]) == 14 and set(row["sites"].values()) == {0.0}
    # Two layers, no outliers: a flipped code is a matter of one ulp, of 10,000 codes at most a few.
    assert row["flipped_codes"]["mean"] < 1e-3
    assert row["cli_nll"] == pytest.approx(row["trained_nll"], abs=1e-4)
    assert row["nll"] == row["cli_nll"] and row["kl"] > 0
    assert row["losses"]["last"] < row["losses"]["first"]
    write(row, given)
    assert json.loads((given.runs / "w4a8_qat" / "row.json").read_text())["nll"] == row["nll"]


@pytest.mark.slow
def test_two_bits_start_from_the_codes_of_another_row(given):
    named = shortened("w2_qat_gptq")
    with pytest.raises(ValueError, match="starts from w2_gptq. Make that row first"):
        trained(named, given)
    calibrated("w2_gptq", MADE["w2_gptq"], given)
    started = open_model(given.runs / "w2_gptq" / "quantized")
    subject = make_subject(named, given.opened, started.variables)
    first = jq.convert(subject.trained, subject.plan)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(started.variables), strict=True):
        np.testing.assert_array_equal(a, b)
    row = trained(named, given)
    assert row["cli_nll"] == pytest.approx(row["trained_nll"], abs=1e-5)
    assert max(row["sites"].values()) < 1e-5


def test_scales_are_taken_over_tile_by_tile(given):
    named = named_run("w2_qat", quick=False, steps=STEPS)
    subject = make_subject(named, given.opened)
    qvariables = jq.convert(subject.trained, subject.plan)
    moved = with_scales_of(subject.trained, qvariables)
    assert jax.tree.structure(moved) == jax.tree.structure(subject.trained)
    again = jq.convert(moved, subject.plan)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(qvariables), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_adapters_are_trained_and_nothing_else(given):
    row = trained(shortened("qlora"), given)
    assert row["codes_unchanged"]
    assert row["losses"]["last"] < row["losses"]["first"]
    assert row["cli_nll"] == pytest.approx(row["trained_nll"], abs=1e-5)
    full = trained(shortened("full"), given)
    for what in ("trained", "optimizer"):
        assert 0 < row["memory"][what] < full["memory"][what]
    # Each of the 14 linears keeps its input at least.
    assert min(row["memory"]["temporary"], full["memory"]["temporary"]) > 14 * 2 * 32 * 64 * 4
    assert full["losses"]["last"] < full["losses"]["first"]
    assert "cli_nll" not in full


@pytest.mark.parametrize("name", ["float32", "w4a8_round", "w2_mse"])
def test_rows_without_training(given, name: str):
    row = calibrated(name, MADE[name], given)
    assert (row["kl"] > 0) == (name != "float32")
