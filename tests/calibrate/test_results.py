import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized_trees import plan_of, some_qarray

import jaxquant as jq
from jaxquant.calibrate._journal import Journal
from jaxquant.calibrate._results import Results
from jaxquant.intercept import Root

INT4_G32 = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=32))
PATHS = ("a/kernel", "b/kernel", "c/kernel")


def filled(journal):
    whole = {path: some_qarray((64, 8), INT4_G32) for path in PATHS}
    results = Results(plan_of(whole), journal)
    for level, (path, q) in enumerate(whole.items()):
        results.put(level, {Root(path=path): q})
        if journal is not None:
            journal.write(level, {str(Root(path=path)): q}, [])
        results.finish(level)
    return whole, results


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("kept", [True, False])
def test_what_was_put_comes_back(tmp_path, kept):
    journal = Journal(tmp_path / "run", {"plan": "0"}, resume=False) if kept else None
    whole, results = filled(journal)
    assert Root(path="d/kernel") not in results
    for path, q in whole.items():
        assert Root(path=path) in results
        assert same(results[Root(path=path)], q)
    by_path = results.by_path()
    assert list(by_path) == list(PATHS) and len(by_path) == 3
    assert "d/kernel" not in by_path
    assert all(same(by_path[path], q) for path, q in whole.items())


def test_with_a_journal_only_the_last_level_is_held(tmp_path):
    _, results = filled(Journal(tmp_path / "run", {"plan": "0"}, resume=False))
    last, first = Root(path=PATHS[-1]), Root(path=PATHS[0])
    assert results[last] is results[last]
    assert results[first] is not results[first]
    _, results = filled(None)
    assert results[first] is results[first]


def test_what_is_read_is_in_memory(tmp_path):
    _, results = filled(Journal(tmp_path / "run", {"plan": "0"}, resume=False))
    q = results[Root(path=PATHS[0])]
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(q))
    assert q.codes.dtype == jnp.int4
