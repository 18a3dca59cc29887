"""One training of the table, in a process of its own: `run.py` starts it, and so can you."""

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from small_lm.language import parts, token_nll
from small_lm.model import config_of
from small_lm.one_run import read_text, take_cores
from small_lm.settings import read_shared
from small_lm.text import Corpus, make_corpus
from training_loop import (
    as_data,
    Loop,
    Problem,
    read_settings,
    TokenWindows,
    train,
    TrainingError,
)

import jaxquant as jq
from fp8_training.settings import ARITHMETIC, CONFIGS, FLOATS, Training
from jaxquant.intercept import check_learned
from jaxquant.models import Llama


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arithmetic", choices=ARITHMETIC)
    parser.add_argument("--seed", type=int, default=0, help="of weights and of the data's order")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="holds a folder a run")
    parser.add_argument("--text", type=pathlib.Path, help="default: the excerpt of the package")
    parser.add_argument("--configs", type=pathlib.Path, default=CONFIGS, help="settings, as TOML")
    parser.add_argument("--cores", nargs="+", type=int, help="to run on; default: all")
    given = parser.parse_args()
    take_cores(given)
    try:
        row = run(given)
    except (TrainingError, ValueError, OSError) as error:
        print(f"{given.arithmetic}: {error}", file=sys.stderr)
        return 2
    print(json.dumps({k: v for k, v in row.items() if k != "nll_per_window"}))
    return 0


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Trains, or goes on, and writes the row."""
    shared = read_shared(given.configs)
    training = read_settings(given.configs / "training.toml", Training)
    loop = msgspec.structs.replace(training.loop, seed=given.seed)
    corpus = make_corpus(read_text(given.text), shared.text)
    name = f"{given.arithmetic}_{given.seed}"
    problem, nll = make_problem(given.arithmetic, shared, corpus, loop)
    out = given.out / name
    earlier = json.loads((out / "row.json").read_text()) if (out / "row.json").exists() else {}
    start = time.perf_counter()
    trained = train(problem, loop, training.optimizer, out, name=name)
    windows = nll(trained.state.variables)
    row = {
        "name": name,
        "arithmetic": given.arithmetic,
        "seed": given.seed,
        "steps": loop.steps,
        "tokens": loop.steps * loop.batch * shared.text.length,
        "nll": float(windows.mean(dtype=np.float64)),
        "nll_per_window": windows.tolist(),
        "seconds": earlier.get("seconds", time.perf_counter() - start),
        "seconds_per_step": trained.seconds_per_step or earlier.get("seconds_per_step"),
    }
    part = out / "row.part"
    part.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    part.replace(out / "row.json")
    return row


def make_problem(arithmetic: str, shared: Any, corpus: Corpus, loop: Loop) -> tuple[Problem, Any]:
    """What the loop trains, and the mean NLL of each held-out window as a function of variables."""
    config = config_of(shared.model, corpus.tokenizer.vocab_size, shared.text.length)
    dtype = jnp.float32 if arithmetic == "float32" else jnp.bfloat16
    model = Llama(config, dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(loop.seed))
    variables = nnx.state(model)
    identity: dict[str, Any] = {
        "model": as_data(shared.model),
        "corpus": corpus.identity,
        "arithmetic": arithmetic,
    }
    if arithmetic in FLOATS:
        graph = nnx.graphdef(model)

        def call(variables: Any, tokens: Any) -> Any:
            return nnx.merge(graph, variables)(tokens)

        settings: dict[str, Any] = {}
    else:
        recipe = jq.recipes.by_name(arithmetic)
        example = jnp.zeros((1, shared.text.length), jnp.int32)
        plan = jq.plan(model, variables, example, recipe=recipe)
        variables = jq.start_training(model, variables, plan)
        call = jq.simulate(model, plan, variables).apply
        identity["recipe"] = plan.fingerprint
        settings = {
            "between": lambda variables, found: jq.update_scales(variables, found, plan),
            "check": check_learned,
        }

    def loss(variables: Any, carried: Any, tokens: Any, fixed: Any, key: Any) -> Any:
        return token_nll(call(variables, tokens), tokens).mean(), carried

    scored = jax.jit(lambda variables, tokens: token_nll(call(variables, tokens), tokens).mean(1))

    def nll(variables: Any) -> np.ndarray:
        found = [scored(variables, jnp.asarray(part)) for part in parts(corpus.held_out)]
        return np.concatenate(found)

    batch = TokenWindows(
        tokens=corpus.train, length=shared.text.length, batch=loop.batch, seed=loop.seed
    )
    return Problem(
        loss=loss,
        variables=variables,
        batch=batch,
        evaluate=lambda variables, carried: {
            "held_out": float(nll(variables).mean(dtype=np.float64))
        },
        labels=jq.training_labels,
        identity=identity,
        **settings,
    ), nll


if __name__ == "__main__":
    sys.exit(main())
