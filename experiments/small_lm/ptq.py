"""Rows that are not trained: the float model by rounding, GPTQ and AWQ. `run.py` starts it."""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import jax
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from training_loop import TokenWindows

import jaxquant as jq
from jaxquant.algorithms import AWQ, GPTQ, Order, RangeSearch
from jaxquant.calibrate import token_batches
from small_lm.one_run import corpus_of, take_cores, text_arguments
from small_lm.score import float_model, measured
from small_lm.settings import read_shared
from small_lm.text import Corpus

ASYMMETRIC = jq.Scheme(
    values=jq.formats.UINT4,
    tile=jq.Tile(contracted=32),
    scale=jq.BFLOAT16,
    range=jq.MinMax(),
    zero_point=jq.formats.UINT4,
)
INT4 = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=32))
INT8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
CALIBRATION = 128
"""Windows of the training text that GPTQ and AWQ see."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """`options` are those of the rule for every linear; the tied embedding is left."""

    what: str
    options: dict[str, Any]


# GPTQ and AWQ as configs/gptq_w4_asym_g64.toml and configs/awq_w4_asym_g64.toml have them.
ROWS = {
    "int4_round": Row(
        what="W4 sym g32, A8 a token, float32 rounded",
        options={"weights": INT4, "activations": INT8},
    ),
    "asym_round": Row(what="W4 asym g32, float32 rounded", options={"weights": ASYMMETRIC}),
    "asym_gptq": Row(
        what="W4 asym g32, GPTQ, damping 0.1, range search, half of QEP's correction",
        options={
            "weights": ASYMMETRIC,
            "algorithm": GPTQ(
                order=Order.STATIC, damping=0.1, search=RangeSearch(), correction=0.5
            ),
        },
    ),
    "asym_awq": Row(
        what="W4 asym g32, AWQ, range search",
        options={"weights": ASYMMETRIC, "scaling": AWQ(), "algorithm": RangeSearch()},
    ),
}


def made(row: Row, model: nnx.Module, corpus: Corpus, length: int) -> tuple[Any, Any, float]:
    """Quantized variables of a row, its plan, and the seconds it took."""
    tokens = TokenWindows(tokens=corpus.train, length=length, batch=CALIBRATION, seed=2)(0)
    rules = (jq.Rule(match="*embed*"), jq.Rule(match="*", **row.options))
    recipe = jq.Recipe(name="row", rules=rules)
    variables = nnx.state(model)
    plan = jq.plan(model, variables, tokens[:1], recipe=recipe)
    start = time.perf_counter()
    if plan.needs_calibration:
        batches = token_batches(tokens, corpus.tokenizer.vocab_size)
        qvariables = jq.calibrate(model, variables, batches, plan).qvariables
    else:
        qvariables = jq.quantize(variables, plan)
    jax.block_until_ready(qvariables)
    return qvariables, plan, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=ROWS)
    text_arguments(parser)
    given = parser.parse_args()
    take_cores(given)
    row, shared, corpus = ROWS[given.name], read_shared(given.configs), corpus_of(given)
    model = float_model(corpus, shared, given.out)
    if model is None:
        print("There is no float model yet. Train the run float32 first.", file=sys.stderr)
        return 2
    qvariables, plan, seconds = made(row, model, corpus, shared.text.length)
    quantized = jq.wrap(model, plan, jq.prepare(qvariables, plan))
    found = {
        "name": given.name,
        "what": row.what,
        "seconds": seconds,
        **measured(quantized, qvariables, plan, corpus, shared, given.out),
    }
    folder = given.out / given.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "row.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
