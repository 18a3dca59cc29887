"""The list of mutants fits the source, and each was found by some test when they were last run."""

import importlib.util
import json
import pathlib
import sys

import pytest

_PATH = pathlib.Path(__file__).with_name("mutants.py")
_SPEC = importlib.util.spec_from_file_location("mutants", _PATH)
mutants = importlib.util.module_from_spec(_SPEC)
sys.modules["mutants"] = mutants
_SPEC.loader.exec_module(mutants)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.what)
def test_a_mutant_changes_one_place_of_the_source(mutant):
    text = (mutants.ROOT / "jaxquant" / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.original) == 1 and mutant.mutated != mutant.original
    assert (mutants.ROOT / "tests" / mutant.tests).is_file()


def test_every_mutant_was_found():
    """`python tests/laws/mutants.py` writes the file."""
    found = json.loads(mutants.RESULTS.read_text(encoding="utf-8"))
    assert list(found) == [mutant.what for mutant in mutants.MUTANTS]
    assert all(found.values())
