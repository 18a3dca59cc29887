"""`jaxquant evaluate`: how well a model predicts tokens, and how far it is from another."""

import argparse
import math
import time
from typing import Any

import numpy as np

from ..evaluate import Evaluation, read_tokens, score
from ..models import open_model, OpenedModel
from ._console import bar, check_json, say, write_json
from ._windows import text_windows


def run_evaluate(arguments: argparse.Namespace) -> None:
    """The command."""
    start = time.perf_counter()
    check_json(arguments.json)
    # What is cheap to check comes before what takes seconds to read.
    tokens = None if arguments.tokens is None else read_tokens(arguments.tokens)
    opened = open_model(arguments.model)
    reference = None if arguments.against is None else open_model(arguments.against)
    _check_vocabularies(opened, reference)
    if tokens is None:
        tokens = text_windows(arguments.text, opened, arguments.length, ids="--tokens")
    _check_ids(tokens, opened)
    model = opened.ready()
    against = None if reference is None else reference.ready()
    load_seconds = time.perf_counter() - start
    with bar("scoring windows") as progress:
        evaluation = score(model, tokens, against=against, batch=arguments.batch, progress=progress)
    write_json(
        arguments.json,
        {
            "model": str(arguments.model),
            "against": arguments.against,
            **evaluation_json(evaluation),
            "load_seconds": load_seconds,
        },
    )
    _print(evaluation, tokens, opened, reference)


def _check_vocabularies(opened: OpenedModel, reference: OpenedModel | None) -> None:
    if reference is None:
        return
    ours, theirs = opened.config.vocab_size, reference.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"{opened.path} has {ours} tokens in its vocabulary and {reference.path} {theirs}. "
            "Only models that share a vocabulary can be compared."
        )


def _check_ids(tokens: np.ndarray, opened: OpenedModel) -> None:
    highest, vocabulary = int(tokens.max()), opened.config.vocab_size
    if highest >= vocabulary:
        raise ValueError(
            f"The tokens go up to id {highest}, but {opened.path} has {vocabulary} in its "
            "vocabulary. Tokenize the text with the model's own tokenizer."
        )


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as `--json` has it; what needs a reference only where there was one.

    `seconds` is all the scoring took, the reference and compiling included, loading not.
    """
    result: dict[str, Any] = {
        "nll": evaluation.nll,
        # JSON has no infinity.
        "perplexity": evaluation.perplexity if evaluation.perplexity < math.inf else None,
        "nll_per_window": list(evaluation.nll_per_window),
        "tokens": evaluation.tokens,
        "seconds": evaluation.seconds,
        "compile_seconds": evaluation.compile_seconds,
        "tokens_per_second": evaluation.tokens_per_second,
    }
    if evaluation.kl is not None:
        result |= {
            "kl": evaluation.kl,
            "top1": evaluation.top1,
            "nll_difference": evaluation.nll_difference,
            "nll_difference_stderr": evaluation.nll_difference_stderr,
        }
    return result


def _print(
    evaluation: Evaluation, tokens: np.ndarray, opened: OpenedModel, reference: OpenedModel | None
) -> None:
    recipe = "" if opened.plan is None else f" by {opened.plan.recipe}"
    say(f"{opened.path} ({opened.source}{recipe})")
    say(f"nll {evaluation.nll:.4f} nats a token, perplexity {evaluation.perplexity:.3f}")
    if reference is not None:
        spread = evaluation.nll_difference_stderr
        error = "" if spread is None else f" +- {spread:.4f}"
        say(
            f"against {reference.path}: nll {evaluation.nll_difference:+.4f}{error}, "
            f"KL {evaluation.kl:.4f}, top-1 {100 * (evaluation.top1 or 0):.1f} %"
        )
    say(
        f"{evaluation.tokens:,} tokens in {tokens.shape[0]} windows of {tokens.shape[1]}, "
        f"{evaluation.seconds:.1f} s, {evaluation.compile_seconds:.1f} s of it compiling, "
        f"else {evaluation.tokens_per_second:.0f} tokens/s"
    )
