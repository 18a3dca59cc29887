"""What a row tells: held-out scores beside the float model's, and sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxquant as jq
from jaxquant.evaluate import Evaluation, score

from .language import parts, WEIGHTS
from .model import config_of, load_variables, make_model
from .settings import Shared
from .text import Corpus

FLOAT = "float32"
"""The run that others are measured against."""


def measured(
    model: Callable[[Any], Any],
    variables: Any,
    plan: jq.Plan | None,
    corpus: Corpus,
    shared: Shared,
    runs: Path,
) -> dict[str, Any]:
    """Scores and sizes of a model on the held-out windows, against the float run if it is there."""
    batch = len(parts(corpus.held_out)[0])
    reference = float_model(corpus, shared, runs)
    found = score(model, corpus.held_out, against=reference, batch=batch)
    return scores(found, corpus) | sizes(variables, plan)


def float_model(corpus: Corpus, shared: Shared, runs: Path) -> nnx.Module | None:
    """The float run's model with its weights, `None` where it was not trained yet."""
    path = runs / FLOAT / WEIGHTS
    if not path.exists():
        return None
    config = config_of(shared.model, corpus.tokenizer.vocab_size, shared.text.length)
    model = make_model(config, sub_norms=False, seed=0)
    return nnx.merge(nnx.graphdef(model), load_variables(path, model))


def scores(found: Evaluation, corpus: Corpus) -> dict[str, Any]:
    """Nats a token, bits a byte, and the difference to the float model with its standard error."""
    kl = None if found.kl_per_window is None else np.asarray(found.kl_per_window)
    return {
        "nll": found.nll,
        "bits_per_byte": found.nll / np.log(2) / corpus.held_out_bytes_per_token,
        "nll_difference": found.nll_difference,
        "nll_difference_stderr": found.nll_difference_stderr,
        "kl": found.kl,
        "kl_stderr": None if kl is None else float(kl.std(ddof=1) / np.sqrt(len(kl))),
        "top1": found.top1,
    }


def sizes(variables: Any, plan: jq.Plan | None) -> dict[str, Any]:
    """Parameters, bytes in all (what is not quantized counts as float16), bits of a quantized
    weight with its scales."""
    if plan is None:
        count = sum(x.size for x in jax.tree.leaves(variables))
        return {"parameters": count, "bytes": 4 * count, "bits_per_weight": 32.0}
    counts = dict(plan.counts)
    quantized = sum(counts[leaf.path] for leaf in plan.leaves)
    held = sum(leaf.bytes_after for leaf in plan.leaves)
    rest = sum(
        x.size for x in jax.tree.leaves(variables, is_leaf=jq_leaf) if not isinstance(x, jq.QArray)
    )
    return {
        "parameters": quantized + rest,
        "bytes": held + 2 * rest,
        "bits_per_weight": 8 * held / quantized,
    }


def jq_leaf(x: Any) -> bool:
    return isinstance(x, jq.QArray)
