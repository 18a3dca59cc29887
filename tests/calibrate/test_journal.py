import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.calibrate._journal import digest_of, finished_levels, Journal, weights_digest
from jaxquant.intercept import Root

IDENTITY = {"plan": "0123", "data": "4567"}


@dataclasses.dataclass(frozen=True)
class Row:
    site: str
    notes: tuple[str, ...]


def results():
    w = jax.random.normal(jax.random.key(0), (64, 8))
    narrow = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=32), scale=jq.BFLOAT16)
    return {
        "b": jq.quantize_array(w, narrow, contracted=(0,)),
        "a[3]": jq.quantize_array(w, jq.schemes.NVFP4, contracted=(0,)),
    }


def test_a_level_comes_back_bit_for_bit(tmp_path):
    journal = Journal(tmp_path / "run", IDENTITY, resume=False)
    written = results()
    assert not journal.has(3)
    journal.write(3, written, [Row("a#dot", ("one",))])
    again = Journal(tmp_path / "run", IDENTITY, resume=True)
    assert again.has(3) and not again.has(2)
    structs = jax.eval_shape(results)
    read, rows, states = again.read(3, structs)
    assert states == []
    assert jax.tree.structure(read) == jax.tree.structure(written)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(written), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert rows == [{"site": "a#dot", "notes": ["one"]}]


def test_states_come_back_too(tmp_path):
    journal = Journal(tmp_path, IDENTITY, resume=False)
    root = Root(path="a", steps=((0, 2), (1, 1)))
    state = {"scale": jnp.float32(0.5), "outlier_weights": jnp.ones((2, 3), jnp.bfloat16)}
    journal.write(0, {}, [], [("a#dot", root, state), ("b#dot", Root(path="b"), {})])
    _, _, ((site, again, read),) = journal.read(0, {})
    assert (site, again) == ("a#dot", root)
    assert {name: (x.dtype, x.shape) for name, x in read.items()} == {
        name: (x.dtype, x.shape) for name, x in state.items()
    }
    assert all(
        np.asarray(read[name]).tobytes() == np.asarray(state[name]).tobytes() for name in state
    )


def test_factors_come_back_bit_for_bit(tmp_path):
    journal = Journal(tmp_path, IDENTITY, resume=False)
    factors = [jnp.linspace(0.1, 3.0, 7), np.full((2, 3), 0.5, np.float32)]
    assert not journal.has_factors(4)
    journal.write_factors(4, factors, [Row("a", ()), Row("b", ("one",))])
    again = Journal(tmp_path, IDENTITY, resume=True)
    assert again.has_factors(4) and not again.has(4)
    read, rows = again.read_factors(4)
    assert [x.tobytes() for x in read] == [np.asarray(x).tobytes() for x in factors]
    assert [row["site"] for row in rows] == ["a", "b"]
    assert finished_levels(tmp_path) == 1
    file = tmp_path / "factors-00004.npz"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(jq.CheckpointError, match="factors-00004.npz is damaged"):
        again.read_factors(4)


def test_another_plan_or_other_data_are_refused(tmp_path):
    Journal(tmp_path, IDENTITY, resume=False)
    with pytest.raises(ValueError, match="other data"):
        Journal(tmp_path, {**IDENTITY, "data": "8"}, resume=True)
    with pytest.raises(ValueError, match="unfinished calibration. Resume it"):
        Journal(tmp_path, IDENTITY, resume=False)


@pytest.mark.parametrize("more", ["held", "asked"])
def test_what_only_one_of_two_calibrations_has_is_a_difference(tmp_path, more):
    both = [IDENTITY, {**IDENTITY, "devices": "2"}]
    begun, now = both[::-1] if more == "held" else both
    Journal(tmp_path, begun, resume=False)
    with pytest.raises(ValueError, match="a calibration with other devices"):
        Journal(tmp_path, now, resume=True)


def test_damage_is_named(tmp_path):
    journal = Journal(tmp_path, IDENTITY, resume=False)
    journal.write(0, results(), [])
    file = tmp_path / "level-00000.npz"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(jq.CheckpointError, match="level-00000.npz is damaged"):
        journal.read(0, jax.eval_shape(results))
    for damaged in (json.dumps(IDENTITY)[:-3], "null", "[1]"):
        (tmp_path / "calibration.json").write_text(damaged)
        with pytest.raises(jq.CheckpointError, match="calibration.json is damaged"):
            Journal(tmp_path, IDENTITY, resume=True)


def test_other_shapes_are_refused(tmp_path):
    journal = Journal(tmp_path, IDENTITY, resume=False)
    journal.write(0, results(), [])
    wrong = jax.eval_shape(lambda: {"b": results()["a[3]"]})
    with pytest.raises(jq.CheckpointError, match="damaged"):
        journal.read(0, wrong)
    with pytest.raises(jq.CheckpointError, match="damaged"):
        journal.read(0, jax.eval_shape(lambda: {"c": results()["b"]}))


def test_the_digest_tells_values_shapes_and_dtypes_apart():
    x = jnp.arange(6, dtype=jnp.int32)
    others = [[(x + 1,)], [(x.reshape(2, 3),)], [(x.astype(jnp.uint32),)], [(x[:3],), (x[3:],)]]
    digests = {digest_of(batches) for batches in ([(x,)], *others)}
    # The last holds the same values in two batches; its shapes differ.
    assert len(digests) == 5
    assert digest_of([(np.arange(6, dtype=np.int32),)]) == digest_of([(x,)])
    assert digest_of([(np.float32(1.0),)]) != digest_of([(np.float32(2.0),)])


def test_a_folder_of_someone_elses_is_refused(tmp_path):
    # All that is in the folder goes when the calibration is done.
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match="exists and holds no calibration"):
            Journal(tmp_path, IDENTITY, resume=resume)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    # What a kill may leave before anything is begun is no one's.
    (tmp_path / "notes.txt").rename(tmp_path / "calibration.draft")
    assert finished_levels(Journal(tmp_path, IDENTITY, resume=False).folder) == 0


def test_activations_of_a_run_that_was_killed_are_removed(tmp_path):
    journal = Journal(tmp_path, IDENTITY, resume=False)
    journal.write(0, results(), [])
    (tmp_path / "activations-x").mkdir()
    (tmp_path / "activations-x" / "0-0").write_bytes(b"old")
    Journal(tmp_path, IDENTITY, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"calibration.json", "level-00000.npz"}
    assert finished_levels(tmp_path) == 1 and finished_levels(tmp_path / "none") == 0


def test_the_digest_of_variables_reads_every_value_and_no_parameters_too():
    w = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    tree = {"params": {"w": w}, "batch_stats": {"mean": np.zeros(3)}, "key": jax.random.key(0)}
    known = weights_digest(tree)
    assert known == weights_digest(tree)
    other = w.copy()
    other[7, 13] += 1
    assert weights_digest({**tree, "params": {"w": other}}) != known
    assert weights_digest({**tree, "batch_stats": {"mean": np.ones(3)}}) != known
    assert weights_digest({**tree, "key": jax.random.key(1)}) != known
