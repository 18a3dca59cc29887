import functools
import shutil

import jax
import jax.numpy as jnp
import moe
import numpy as np
import pytest
from flax import nnx
from tiny_configs import LLAMA

import jaxquant as jq
from jaxquant.algorithms import GPTQ, Order
from jaxquant.calibrate import calibrate, Inputs, Settings, token_batches
from jaxquant.checkpoint import LazyArray
from jaxquant.models import Llama
from jaxquant.qarray import is_qarray

G8 = jq.Scheme(values=jq.formats.INT3, tile=jq.Tile(contracted=8))


def recipe(scheme=G8, algorithm=None, leave="*embed*"):
    algorithm = GPTQ(order=Order.STATIC) if algorithm is None else algorithm
    return jq.Recipe(
        name="gptq",
        rules=(
            jq.Rule(match=leave, optional=True),
            jq.Rule(match="*router*", optional=True),
            jq.Rule(match="*", weights=scheme, algorithm=algorithm),
        ),
    )


@functools.cache
def llama():
    model = Llama(LLAMA, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (12, 16))
    return model, nnx.state(model), token_batches(tokens, LLAMA.vocab_size, size=4)


@functools.cache
def decoder(scanned):
    model = moe.Decoder(scanned=True)
    variables = model.init(jax.random.key(0), moe.TOKENS)
    tokens = np.random.default_rng(0).integers(0, moe.VOCABULARY, (8, 16))
    batches = token_batches(tokens, moe.VOCABULARY, size=4)
    if not scanned:
        model = moe.Decoder(scanned=False)
        variables = {"params": moe.unstacked(variables["params"])}
    return model, variables, batches


def run(model, variables, batches, *, scheme=G8, algorithm=None, **options):
    plan = jq.plan(model, variables, *batches[0], recipe=recipe(scheme, algorithm))
    return plan, calibrate(model, variables, batches, plan, **options)


def same(a, b):
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(left) == len(right) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(left, right, strict=True)
    )


def test_outputs_err_less_than_those_of_rounding_at_every_site():
    model, variables, batches = llama()
    plan, made = run(model, variables, batches)
    assert [row.site for row in made.sites] == [s.site for s in plan.sites if s.weights is not None]
    for row in made.sites:
        assert row.error < row.nearest_error
        assert row.rows == 12 * 16
        assert not row.notes
    qmodel = jq.wrap(model, plan, made.qvariables)
    assert bool(jnp.isfinite(qmodel(*batches[0])).all())
    # And the weights themselves err more.
    _, rounded = jq.quantize(variables, _data_free(plan, model, variables, batches), account=True)
    worse = [made.account.by_path[path].relative > error.relative for path, error in rounded.errors]
    assert sum(worse) > 0.8 * len(worse)


def _data_free(plan, model, variables, batches):
    rules = (jq.Rule(match="*embed*"), jq.Rule(match="*", weights=G8))
    return jq.plan(model, variables, *batches[0], recipe=jq.Recipe(name="plain", rules=rules))


def test_scanned_layers_get_the_codes_of_layers_side_by_side():
    stacked = run(*decoder(True))[1].qvariables["params"]
    apart = run(*decoder(False))[1].qvariables["params"]
    assert same(moe.unstacked(stacked), apart)


@pytest.mark.parametrize("scanned", [True, False])
def test_experts_and_layers_beat_rounding(scanned):
    _, made = run(*decoder(scanned))
    assert len(made.sites) == 6 * moe.LAYERS
    better = [row.error < row.nearest_error for row in made.sites]
    # Experts of a few rows in two blocks of 8 columns: now and then there is nothing to gain.
    assert sum(better) >= len(better) - 1
    assert sum(r.error for r in made.sites) < 0.8 * sum(r.nearest_error for r in made.sites)


def test_activations_in_files_change_nothing(tmp_path):
    model, variables, batches = llama()
    plain = run(model, variables, batches)[1].qvariables
    spilled = run(model, variables, batches, settings=Settings(memory=0), out=tmp_path / "run")[
        1
    ].qvariables
    assert same(plain, spilled)
    assert not (tmp_path / "run").exists()


def test_later_levels_see_what_quantized_ones_put_out():
    model, variables, batches = llama()
    _, quantized = run(model, variables, batches)
    _, floats = run(model, variables, batches, settings=Settings(inputs=Inputs.FLOAT))
    first, last = "layers/0/attention/q/kernel", f"layers/{LLAMA.layers - 1}/mlp/down/kernel"
    a, b = ({row.root: row for row in made.sites} for made in (quantized, floats))
    assert a[first].error == b[first].error
    assert a[last].nearest_error != b[last].nearest_error


def test_what_is_kept_is_read_from_the_folder_and_saved_the_same(tmp_path):
    model, variables, batches = llama()
    plan, plain = run(model, variables, batches)
    _, kept = run(model, variables, batches, out=tmp_path / "run", keep=True)
    assert (tmp_path / "run").exists()
    codes = [x for x in jax.tree.leaves(kept.qvariables, is_leaf=is_qarray) if is_qarray(x)]
    assert codes and all(isinstance(x, LazyArray) for q in codes for x in jax.tree.leaves(q))
    assert same(plain.qvariables, kept.qvariables)
    assert plain.account.errors == kept.account.errors
    jq.save(tmp_path / "kept", kept.qvariables, plan, account=kept.account)
    again, _ = jq.load(tmp_path / "kept", template=variables)
    assert same(again, plain.qvariables)


def test_a_folder_may_be_a_link_and_one_that_cannot_be_removed_loses_nothing(tmp_path, monkeypatch):
    model, variables, batches = llama()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    _, plain = run(model, variables, batches)
    _, linked = run(model, variables, batches, out=tmp_path / "link")
    assert same(plain.qvariables, linked.qvariables) and not (tmp_path / "real").exists()

    def fails(folder, **options):
        raise OSError("busy")

    monkeypatch.setattr(shutil, "rmtree", fails)
    with pytest.warns(UserWarning, match="busy could not be removed: busy. Remove it"):
        _, kept = run(model, variables, batches, out=tmp_path / "busy")
    assert same(plain.qvariables, kept.qvariables)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_calibration_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, after):
    model, variables, batches = llama()
    wanted = run(model, variables, batches)[1]

    def stop(row, level, levels):
        if stop.count == after:
            raise Stop
        stop.count += 1

    stop.count = 0
    with pytest.raises(Stop):
        run(model, variables, batches, out=tmp_path / "run", progress=stop)
    with pytest.raises(ValueError, match="unfinished calibration"):
        run(model, variables, batches, out=tmp_path / "run")
    with pytest.raises(ValueError, match="other data"):
        run(model, variables, batches[:1], out=tmp_path / "run", resume=True)
    again = []
    made = run(
        model,
        variables,
        batches,
        out=tmp_path / "run",
        resume=True,
        progress=lambda row, *_: again.append(row.root),
    )[1]
    assert same(wanted.qvariables, made.qvariables)
    assert [row.root for row in made.sites] == [row.root for row in wanted.sites]
    assert len(again) < len(made.sites) or after == 1
    assert made.account.errors == wanted.account.errors


def test_a_short_last_batch_counts_as_much_as_it_holds():
    model, variables, batches = llama()
    tokens = np.concatenate([np.asarray(b[0]) for b in batches])
    uneven = [(jnp.asarray(tokens[:5]),), (jnp.asarray(tokens[5:10]),), (jnp.asarray(tokens[10:]),)]
    _, made = run(model, variables, uneven)
    _, wanted = run(model, variables, batches)
    assert [row.rows for row in made.sites] == [row.rows for row in wanted.sites]
    # Sums in another order: a code on the edge may fall the other way, and move those after it.
    codes = [
        np.concatenate([np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(m.qvariables)])
        for m in (made, wanted)
    ]
    assert np.mean(codes[0] == codes[1]) > 0.97


def test_an_expert_that_saw_nothing_is_rounded_and_named():
    model, variables, batches = decoder(False)
    params = jax.tree.map(lambda x: x, variables["params"])  # New dictionaries.
    for i in range(moe.LAYERS):
        # All tokens like the first two experts best, by far.
        kernel = jnp.zeros((moe.D, moe.EXPERTS))
        params[f"layer_{i}"]["experts"]["router"] = {"kernel": kernel}
    plan, made = run(model, {"params": params}, batches)
    notes = {row.root: row.notes for row in made.sites if "experts" in row.root}
    starved = [note for held in notes.values() for note in held if "stack" in note]
    # Of equal probabilities the first two are taken.
    assert starved == ["entries 2, 3 of the stack saw too few rows: rounded to nearest"] * 6
    assert any(note.endswith(f" and 5 more: {starved[0]}") for note in made.account.notes)
    assert "and 5 more: entries 2, 3 of the stack saw too" in str(made.account)


def test_fewer_rows_than_inputs_are_told_of():
    model, variables, batches = llama()
    _, made = run(model, variables, [(batches[0][0][:1, :8],)])
    assert all(row.notes[-1].startswith("8 rows for ") for row in made.sites)
    assert "8 rows for 32 inputs" in str(made.account)


def test_inputs_that_are_not_finite_are_named():
    model, variables, batches = llama()
    broken = jax.tree.map(lambda x: x, variables)
    norm = broken["layers"][1]["mlp_norm"]["scale"]
    broken["layers"][1]["mlp_norm"]["scale"] = norm.replace(norm.get_value().at[0].set(jnp.inf))
    with pytest.raises(
        ValueError, match="layers/1/mlp/gate/kernel, layers/1/mlp/up/kernel hold NaN"
    ):
        run(model, broken, batches)


def test_no_data_is_an_error():
    model, variables, batches = llama()
    plan = jq.plan(model, variables, *batches[0], recipe=recipe())
    with pytest.raises(ValueError, match="no calibration data"):
        calibrate(model, variables, [], plan)


def test_what_cannot_be_meant_is_an_error():
    model, variables, batches = llama()
    plan = jq.plan(model, variables, *batches[0], recipe=recipe())
    for option in ("resume", "keep"):
        with pytest.raises(ValueError, match="about a folder"):
            calibrate(model, variables, batches, plan, **{option: True})
    plain = _data_free(plan, model, variables, batches)
    with pytest.raises(ValueError, match="kernel is quantized already, and .* other"):
        calibrate(model, jq.quantize(variables, plain), batches, plan)


def test_a_site_that_data_cannot_be_had_for_is_an_error():
    from flax import linen as nn

    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(), (8, 8))
            return jax.lax.cond(x.sum() > 0, lambda: x @ kernel, lambda: x)

    x = jnp.ones((2, 8))
    model = Branch()
    with pytest.raises(jq.PlanError, match="kernel#dot cannot be calibrated: cond"):
        run(model, model.init(jax.random.key(0), x), [(x,)])
