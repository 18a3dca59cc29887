"""One training of the table, in a process of its own: `run.py` starts it, and so can you."""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import msgspec

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from training_loop import Devices, train, TrainingError

from small_lm.settings import CONFIGS, Named, read_run, read_shared
from small_lm.text import Corpus, make_corpus


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a file of the folder of settings, without .toml")
    text_arguments(parser)
    parser.add_argument(
        "--devices", type=int, help="CPU devices to make, over which data are dealt"
    )
    parser.add_argument(
        "--fsdp", type=int, default=1, help="over how many of them weights are, too"
    )
    given = parser.parse_args()
    take_cores(given)
    try:
        named = read_run(given.name, given.configs)
        if given.devices is not None:
            named = over_devices(named, given.devices, given.fsdp)
        made = run(named, given)
    except (TrainingError, ValueError, OSError) as error:
        print(f"{given.name}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(made))
    return 0


def text_arguments(parser: argparse.ArgumentParser) -> None:
    """Where runs are, and what they are trained on."""
    parser.add_argument("--out", type=pathlib.Path, required=True, help="holds a folder a run")
    parser.add_argument("--text", type=pathlib.Path, help="default: the excerpt of the package")
    parser.add_argument("--held-out", nargs="+", metavar="BOOK", help="default: see model.toml")
    parser.add_argument("--configs", type=pathlib.Path, default=CONFIGS, help="settings, as TOML")
    parser.add_argument("--cores", nargs="+", type=int, help="to run on; default: all")


def take_cores(given: argparse.Namespace) -> None:
    """Before JAX starts: its threads are as many as the cores."""
    if given.cores:
        os.sched_setaffinity(0, given.cores)


def corpus_of(given: argparse.Namespace) -> Corpus:
    return make_corpus(read_text(given.text), read_shared(given.configs).text, given.held_out)


def over_devices(named: Named, count: int, fsdp: int) -> Named:
    """The run on `count` CPU devices, in place of what its settings say.

    **Raises:** `ValueError` if `fsdp` does not divide them.
    """
    if count < 1 or fsdp < 1 or count % fsdp:
        raise ValueError(f"--devices {count} cannot be shared by --fsdp {fsdp}. Give a multiple.")
    jax.config.update("jax_num_cpu_devices", count)
    devices = Devices(data=count // fsdp, fsdp=fsdp)
    run = msgspec.structs.replace(named.run, devices=devices)
    return dataclasses.replace(named, run=run)


def run(named: Named, given: argparse.Namespace) -> dict[str, Any]:
    """Trains, or goes on; then writes the weights, the row, and for a plan the checkpoint."""
    # Imported late: the number of devices is set before JAX starts.
    import jaxquant as jq
    from small_lm.language import make_problem, make_subject, WEIGHTS
    from small_lm.model import save_variables
    from small_lm.score import measured

    shared, corpus = read_shared(given.configs), corpus_of(given)
    out = given.out / named.name
    subject = make_subject(named, shared, corpus, given.out)
    problem = make_problem(named, shared, corpus, subject, given.out)
    loop = named.run.loop
    earlier = json.loads((out / "row.json").read_text()) if (out / "row.json").exists() else {}
    start = time.perf_counter()
    trained = train(
        problem, loop, named.run.optimizer, out, devices=named.run.devices, name=named.name
    )
    seconds = time.perf_counter() - start
    # Through the host: from here on on one device, and committed to none.
    variables = jax.tree.map(lambda x: jnp.asarray(jax.device_get(x)), trained.state.variables)
    model, qvariables = subject.converted(variables)
    row = {
        "name": named.name,
        "what": named.run.what,
        "steps": loop.steps,
        "tokens": loop.steps * loop.batch * shared.text.length,
        "guess_nll": math.log(corpus.tokenizer.vocab_size),
        "trained_nll": trained.scores["held_out"],
        # Of a run that was finished before, and is scored again, those of then.
        "seconds": earlier.get("seconds", seconds),
        "seconds_per_step": trained.seconds_per_step or earlier.get("seconds_per_step"),
        **measured(model, qvariables, subject.plan, corpus, shared, given.out),
    }
    save_variables(out / WEIGHTS, own_weights(variables))
    corpus.tokenizer.save(out)
    if subject.plan is not None:
        jq.save(out / "quantized", qvariables, subject.plan)
    # Written beside and renamed: a row that is there is whole.
    part = out / "row.part"
    part.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    part.replace(out / "row.json")
    return row


def own_weights(variables: Any) -> Any:
    """The model's own parameters, without what quantization has beside them."""
    from flax import nnx

    return nnx.State({k: v for k, v in variables.raw_mapping.items() if k != "jaxquant"})


def read_text(path: pathlib.Path | None) -> str:
    if path is not None:
        return path.read_text(encoding="utf-8")
    from jaxquant.cli._demo import excerpt

    return excerpt()


if __name__ == "__main__":
    sys.exit(main())
