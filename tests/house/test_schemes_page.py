"""docs/schemes.md lists every named scheme, with figures that the experiment measured."""

import json
import pathlib
import re

import jax.numpy as jnp
import pytest

from jaxquant.qarray import abstract_qarray, schemes

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "experiments/number_formats/results.json").read_text())
LINES = {
    found[1]: [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs/schemes.md").read_text(encoding="utf-8").splitlines()
    if (found := re.match(r"\| `(\w+)` \|", line))
}


def test_the_page_names_every_scheme_and_no_other():
    assert {name.lower() for name in LINES} == set(schemes.NAMED)


@pytest.mark.parametrize("name", LINES)
def test_bits_and_errors_are_those_that_were_measured(name: str):
    scheme = schemes.NAMED[name.lower()]
    bits, gauss, heavy = map(float, LINES[name][-3:])
    q = abstract_qarray(tuple(RESULTS["shape"]), jnp.float32, scheme, contracted=(-1,))
    assert bits == pytest.approx(q.bits_per_value, rel=1e-3)
    measured = RESULTS["rows"] + RESULTS["without_anchor"]
    # Four digits on the page.
    assert any(
        row["scheme"] == str(scheme)
        and row["gauss"] == pytest.approx(gauss, rel=1e-3)
        and row["heavy"] == pytest.approx(heavy, rel=1e-3)
        for row in measured
    )
