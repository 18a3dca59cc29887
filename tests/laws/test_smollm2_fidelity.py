"""The claims of `experiments/fidelity`, on one block of the real model and a few dozen tokens."""

import functools
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "fidelity"
LAYERS, LENGTH = 1, 24
# Forms of `site_errors.FORMS` that between them reach every backend and layout.
FORMS = {
    "w8a8": ["xla, canonical, all rows", "xla_cpu, prepared, one row"],
    "fp8": ["xla, canonical, all rows", "xla_cpu, prepared, all rows"],
    "w8a16": ["xla, canonical, all rows", "xla_cpu, prepared, 64 rows"],
    "w4a16_g64": ["xla_cpu, prepared, 5 rows", "xla_cpu, packed, one row"],
}
CUTS = {
    "w8a8": ["weights over 4 devices", "batch over 4 devices"],
    "fp8": ["weights over 4 devices"],
}
# Runs that sum the same numbers in the same order, in another layout or on other devices.
SAME_BITS = ("jit", "jit, canonical layout", "batch over 4 devices")

pytestmark = pytest.mark.registry


@pytest.fixture(scope="module")
def experiment():
    """The experiment's modules, which import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import logit_errors
        import run_divergence
        import site_errors
        import smollm2

        modules = (smollm2, site_errors, logit_errors, run_divergence)
        yield {module.__name__: module for module in modules}
        for name in [*sys.modules]:
            file = getattr(sys.modules[name], "__file__", None)
            if file and pathlib.Path(file).parent == FOLDER:
                del sys.modules[name]


@pytest.fixture(scope="module")
def subject(experiment, smollm2_gguf):
    return experiment["smollm2"].load_subject(smollm2_gguf, None, layers=LAYERS, length=LENGTH)


@pytest.fixture(scope="module")
def quantized(experiment, subject):
    from jaxquant import recipes

    @functools.cache
    def by_name(name):
        return experiment["smollm2"].quantized_by(recipes.by_name(name), subject)

    return by_name


@pytest.fixture(scope="module")
def inputs(experiment, subject):
    return experiment["smollm2"].captured(subject)


def failures(rows):
    rows = list(rows)
    assert rows
    return [row for row in rows if not row["holds"]]


@pytest.mark.parametrize("name", FORMS)
def test_each_product_is_as_near_to_exact_as_its_roundings_allow(
    experiment, quantized, inputs, name
):
    assert len(inputs) == 7 * LAYERS
    sites = experiment["site_errors"]
    forms = [form for form in sites.FORMS[name] if str(form) in FORMS[name]]
    rows = list(sites.site_errors(name, quantized(name), inputs, forms))
    assert [row["form"] for row in rows] == FORMS[name]
    assert not failures(rows)
    if name == "w8a8":
        # So that the float32 in which sums are seen is the sum itself.
        assert all(row["largest_integer_sum"] < 2**24 for row in rows)
    if name in ("w8a8", "fp8"):
        assert all(row["outputs_that_differ_when_compiled_together"] == 0 for row in rows)


# With int8 a prompt of 24 tokens is multiplied as digits, with int4 only single tokens are.
@pytest.mark.parametrize(("name", "decode"), [("w8a16", False), ("w4a16_g64", True)])
def test_weight_only_models_are_the_plain_model_on_dequantized_weights(
    experiment, subject, quantized, name, decode
):
    errors = experiment["logit_errors"].float32_errors(
        name, subject, quantized(name), [LENGTH], decode=decode
    )
    assert not failures(errors)


def test_in_bfloat16_they_are_about_as_far_from_float64(experiment, subject, quantized):
    errors = experiment["logit_errors"]
    assert errors.reference_error(subject, LENGTH) < 1e-5
    name = "w8a16"
    rows = errors.bfloat16_errors(name, subject, quantized(name), [LENGTH], decode=False)
    assert not failures(rows)


@pytest.mark.parametrize("name", CUTS)
def test_runs_agree(experiment, subject, quantized, name):
    """Eager, compiled and sharded runs of one block; deeper, roundings part all that differ."""
    divergence = experiment["run_divergence"]
    rows = list(divergence.divergences(name, subject, quantized(name), LENGTH, CUTS[name]))
    found = {row["run"].removeprefix("1-block model, "): row for row in rows}
    assert {"eager", *CUTS[name]} < {*found}
    assert not failures(row for row in rows if "limit" in row)
    for run in {*SAME_BITS} & {*found}:
        assert found[run]["equal_probabilities"] == 1.0, run
