"""The released model: real weights in full precision, on books that it did not see."""

import dataclasses
import functools
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_lm.text import books_of

import jaxquant as jq
from jaxquant.cli._demo import excerpt
from jaxquant.evaluate import score, windows_of_text
from jaxquant.models import open_model
from jaxquant.qarray import dequantize
from jaxquant.recipes import GPTQ_W3_SYM_G64

FOLDER = pathlib.Path(__file__).parents[3] / "experiments" / "small_lm" / "model"
LENGTH = 256


@functools.cache
def opened():
    return open_model(FOLDER)


@functools.cache
def windows(book: str) -> np.ndarray:
    """Windows of a book of the excerpt, which the model was not trained on."""
    return windows_of_text(books_of(excerpt())[book], opened().tokenizer.encode, LENGTH)


def model_and_variables():
    model = opened().ready()
    return model, nnx.state(model)


def test_it_reads_books_that_it_did_not_see():
    found = score(opened().ready(), windows("Ruth"), batch=4)
    assert found.nll < 3.6
    # Chance has the logarithm of 2,048; words in any order have about 5.5.
    shuffled = np.random.default_rng(0).permuted(windows("Ruth"), axis=1)
    assert score(opened().ready(), shuffled, batch=4).nll > found.nll + 1


@pytest.mark.slow
def test_gptq_loses_on_weights_and_wins_on_outputs():
    """What it promises (Frantar et al. 2022), on real text: 3 bits, calibrated on another book."""
    model, variables = model_and_variables()
    example = jnp.asarray(windows("Esther")[:1])
    nearest = dataclasses.replace(
        GPTQ_W3_SYM_G64,
        rules=tuple(dataclasses.replace(r, algorithm=None) for r in GPTQ_W3_SYM_G64.rules),
    )
    plan = jq.plan(model, variables, example, recipe=nearest)
    rounded = jq.quantize(variables, plan)
    informed = jq.plan(model, variables, example, recipe=GPTQ_W3_SYM_G64)
    batches = [(jnp.asarray(part),) for part in np.array_split(windows("Esther"), 4)]
    made = jq.calibrate(model, variables, batches, informed).qvariables
    kl = {}
    for name, own, held in (("rounded", plan, rounded), ("gptq", informed, made)):
        qmodel = jq.wrap(model, own, held)
        kl[name] = score(qmodel, windows("Jonah"), against=model, batch=4).kl
    assert kl["gptq"] < 0.7 * kl["rounded"]
    assert error(variables, made) > error(variables, rounded)


def error(variables, qvariables) -> float:
    """The squared error of all codes."""
    before, after = (dict(nnx.to_flat_state(v)) for v in (variables, qvariables))
    pairs = ((before[path].get_value(), after[path].get_value()) for path in before)
    return sum(
        float(jnp.square(dequantize(q, jnp.float32) - w).sum())
        for w, q in pairs
        if isinstance(q, jq.QArray)
    )
