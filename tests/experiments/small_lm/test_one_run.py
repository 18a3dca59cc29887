import argparse
import json

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from small_lm.language import divergence, token_nll
from small_lm.model import config_of, load_variables, make_model, Normed, save_variables
from small_lm.one_run import over_devices, run
from small_lm.settings import CONFIGS, Model, read_run, Shared, Text
from training_loop import as_data, read_metrics

import jaxquant as jq

MODEL = Model(width=64, hidden=64, layers=1, heads=2, kv_heads=1, head_dim=32)
TEXT = Text(vocabulary=300, length=16, held_out=["Jonah"], windows=8)
STEPS = 6


def toml(data: dict) -> str:
    """Tables of plain values, two deep."""
    plain = [f"{k} = {json.dumps(v)}" for k, v in data.items() if not isinstance(v, dict | None)]
    tables = [f"[{k}]\n{toml(v)}" for k, v in data.items() if isinstance(v, dict)]
    return "\n".join((*plain, *tables))


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> argparse.Namespace:
    """The runs of the experiment, with a tiny model and a few steps."""
    folder = tmp_path_factory.mktemp("small_lm")
    shared = Shared(model=MODEL, text=TEXT)
    (folder / "model.toml").write_text(toml(as_data(shared)))
    for name in ("float32", "int4_lsq", "bitnet", "asym_qat_distilled"):
        settings = read_run(name).run
        loop = msgspec.structs.replace(settings.loop, steps=STEPS, log_every=2)
        optimizer = msgspec.structs.replace(settings.optimizer, warmup=2)
        changed = as_data(msgspec.structs.replace(settings, loop=loop, optimizer=optimizer))
        changed["optimizer"].pop("groups")
        if settings.recipe is not None:
            changed["recipe"] = str((CONFIGS / settings.recipe).resolve())
        (folder / f"{name}.toml").write_text(toml(changed))
    return argparse.Namespace(out=folder / "runs", text=None, held_out=None, configs=folder)


@pytest.fixture(scope="module")
def float_row(given):
    return run(read_run("float32", given.configs), given)


def test_the_float_run_learns_and_is_stored(given, float_row):
    assert float_row["nll"] == pytest.approx(float_row["trained_nll"], abs=1e-5)
    rows = read_metrics(given.out / "float32" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    assert json.loads((given.out / "float32" / "row.json").read_text()) == float_row


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4_lsq", "bitnet", "asym_qat_distilled"])
def test_what_is_converted_scores_as_it_did_in_training(given, float_row, name: str):
    """The same codes; sums of float32 in another order, twice over the model's few layers."""
    named = read_run(name, given.configs)
    row = run(named, given)
    assert row["nll"] == pytest.approx(row["trained_nll"], abs=1e-5)
    assert row["bits_per_weight"] < 6 and row["kl"] > 0
    _, plan = jq.load(given.out / name / "quantized")
    assert 8 * sum(leaf.bytes_after for leaf in plan.leaves) == pytest.approx(
        row["bits_per_weight"] * sum(dict(plan.counts)[leaf.path] for leaf in plan.leaves)
    )
    # A finished run is only scored.
    assert run(named, given)["nll"] == row["nll"]


def test_sub_norms_stand_before_every_linear_and_are_stored(tmp_path):
    config = config_of(MODEL, 300, 16)
    model = make_model(config, sub_norms=True, seed=0)
    assert isinstance(model.layers[0].attention.o, Normed)
    assert isinstance(model.layers[0].mlp.down, Normed)
    from flax import nnx

    state = nnx.state(model)
    save_variables(tmp_path / "a.safetensors", state)
    again = load_variables(tmp_path / "a.safetensors", make_model(config, sub_norms=True, seed=1))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.o\.kernel is None there"):
        load_variables(tmp_path / "a.safetensors", make_model(config, sub_norms=False, seed=1))


def test_losses_are_their_definitions():
    rng = np.random.default_rng(0)
    ours, theirs = (rng.normal(size=(2, 3, 5)) for _ in range(2))
    tokens = rng.integers(0, 5, (2, 3))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (theirs, ours))
    nll = -np.log(np.take_along_axis(q[:, :-1], tokens[:, 1:, None], -1))[..., 0]
    kl = (p * np.log(p / q)).sum(-1)[:, :-1]
    logits, teacher = (jnp.asarray(x, jnp.float32) for x in (ours, theirs))
    # A few float32 operations on numbers of order 1.
    found = token_nll(logits, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(found, nll, atol=1e-6)
    np.testing.assert_allclose(divergence(teacher, logits), kl, atol=1e-6)
    np.testing.assert_allclose(divergence(logits, logits), 0.0, atol=1e-6)


def test_devices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="--devices 4 cannot be shared by --fsdp 3"):
        over_devices(read_run("float32"), 4, 3)
