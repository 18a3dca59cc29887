"""`jaxquant demo`: a real language model by five recipes, in one table."""

import argparse
import dataclasses
import importlib.resources
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..evaluate import Evaluation, medians, score_all, windows_of_text
from ..models import find_smollm2, open_model, OpenedModel
from ._bench import machine, side_rows
from ._console import bar, say, show, table, write_json
from ._demo_plot import write_plot
from ._evaluate import evaluation_json
from ._sides import (
    CONTEXT,
    Decoding,
    FLOAT,
    float_side,
    prefill,
    quantized_side,
    Side,
    wanted_recipes,
)

TEXT = "kjv_excerpt.txt"
QUESTION = "What is the capital of France? Answer in one sentence."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How much the demo does."""

    windows: int
    length: int
    rounds: int
    steps: int  # Tokens decoded in a round.


FULL = Effort(windows=16, length=512, rounds=10, steps=8)
QUICK = Effort(windows=4, length=256, rounds=3, steps=4)


def run_demo(arguments: argparse.Namespace) -> None:
    """The command."""
    start = time.perf_counter()
    check_folder(arguments.out)
    effort = QUICK if arguments.quick else FULL
    opened = open_model(find_smollm2())
    plain = float_side(opened)
    tokens = windows_of_text(excerpt(), opened.tokenizer.encode, effort.length)[: effort.windows]
    say(f"SmolLM2-135M-Instruct, {opened.source}, {machine()}")
    say(
        f"{effort.windows} windows of {effort.length} tokens of the King James Bible; "
        f"speeds are medians of {effort.rounds} rounds in turn"
    )
    sides = [plain]
    with bar("quantizing") as progress:
        wanted = wanted_recipes(None)
        for done, recipe in enumerate(wanted):
            progress(done, len(wanted))
            sides.append(quantized_side(opened, plain, recipe))
    say(f"  quantized by {len(wanted)} recipes after {time.perf_counter() - start:.0f} s")
    with bar("scoring windows") as progress:
        models = {side.name: side.model for side in sides}
        evaluations = score_all(models, tokens, against=plain.model, progress=progress)
    rows = [_row(side, evaluations[side.name]) for side in sides]
    say(f"  scored after {time.perf_counter() - start:.0f} s")
    _, prefill_rows = _timed(prefill, effort.length, sides, effort)
    decodings, decode_rows = _timed(Decoding, effort.steps, sides, effort)
    for row, at_once, one_by_one in zip(rows, prefill_rows, decode_rows, strict=True):
        row |= {"prefill": at_once, "decode": one_by_one}
    say(f"  timed after {time.perf_counter() - start:.0f} s")
    completions = _completions(opened, sides, decodings)
    result = {
        "model": "SmolLM2-135M-Instruct",
        "source": opened.source,
        "machine": machine(),
        "text": TEXT,
        "windows": effort.windows,
        "length": effort.length,
        "rounds": effort.rounds,
        "quick": arguments.quick,
        "rows": rows,
        "question": QUESTION,
        "completions": completions,
        "seconds": time.perf_counter() - start,
    }
    report(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "demo.json", result)
    write_plot(arguments.out / "demo.png", rows)
    say(f"wrote demo.json and demo.png into {arguments.out}; {result['seconds']:.0f} s in all")


def check_folder(out: pathlib.Path) -> None:
    """Says now what would stop the writing after minutes of work.

    **Raises:** `ValueError` if a file is in the folder's place.
    """
    for place in (out, *out.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"--out {out}: {place} is a file. Give a folder.")


def excerpt() -> str:
    """The text that the demo evaluates on, which is part of the package."""
    return (importlib.resources.files("jaxquant.cli") / "_text" / TEXT).read_text(encoding="utf-8")


def _row(side: Side, evaluation: Evaluation) -> dict[str, Any]:
    left = [] if side.plan is None else [s.site for s in side.plan.sites if s.reason is not None]
    return {
        "name": side.name,
        "recipe_source": None if side.recipe is None else side.recipe.source,
        "bytes": side.inventory.bytes,
        "bits_per_weight": side.inventory.bits_per_weight,
        "left_in_float": left,
        **evaluation_json(evaluation),
    }


def _timed(
    make: Callable[[Any, int], Any], count: int, sides: list[Side], effort: Effort
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `make` makes of each side's model, and how fast those are."""
    made = {side.name: make(side.model, count) for side in sides}
    with bar("timing") as progress:
        timings = medians(made, rounds=effort.rounds, warmups=1, progress=progress)
    rows = side_rows(timings, count)
    kept = ("tokens_per_second", "ratio", "seconds")
    return made, [{key: row[key] for key in kept} for row in rows]


def _completions(
    opened: OpenedModel, sides: list[Side], decodings: Mapping[str, Decoding]
) -> dict[str, str]:
    """What the model says before, and by the recipe that leaves the fewest bytes."""
    tokenizer = opened.tokenizer
    # The model's own chat format, written out: its template is Jinja, which we do not run.
    prompt = tokenizer.encode(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    smallest = min(sides, key=lambda side: side.inventory.bytes)
    return {
        name: tokenizer.decode(decodings[name].complete(prompt, tokenizer.eos_id)).strip()
        for name in (FLOAT, smallest.name)
    }


def report(result: dict[str, Any]) -> None:
    """Prints the table, what it does not say by itself, and the completions."""
    made = table("recipe", "bits", "MB", "NLL", "difference", "KL", "top-1 %", "prefill", "decode")
    for row in result["rows"]:
        made.add_row(*_cells(row))
    show(made)
    say(
        f"bits a weight over all {_millions(result['rows'][0])} M parameters, scales included; "
        "NLL in nats a token; difference\n(with its standard error over windows), KL and top-1 "
        f"against float32; tokens a second, and as a multiple\nof float32's, for a prompt of "
        f"{result['length']} tokens, and one by one with {CONTEXT} tokens in the cache."
    )
    for row in result["rows"][1:]:
        left = ", ".join([*row["left_in_float"], "norms"])
        say(f"  {row['name']} leaves in float32: {left}")
    say(
        f"The baseline is the {result['source']}, not the model as it was trained. Its\n"
        "weights lie on a 4-bit grid with a scale and a minimum for 32 of them, so int4 of just "
        "that kind would\nlose nothing here, by accident. None of these recipes is of that kind."
    )
    say(f"\n> {result['question']}")
    for name, text in result["completions"].items():
        say(f"{name}: {text}")
    say("")


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["name"], f"{row['bits_per_weight']:.3f}", f"{row['bytes'] / 1e6:.1f}"]
    cells.append(f"{row['nll']:.4f}")
    if row["name"] != FLOAT:
        spread = row["nll_difference_stderr"]
        around = "" if spread is None else f" ±{spread:.3f}"
        cells.append(f"{row['nll_difference']:+.4f}{around}")
        cells += [f"{row['kl']:.4f}", f"{100 * row['top1']:.1f}"]
    else:
        cells += ["", "", ""]
    for name in ("prefill", "decode"):
        speed = row[name]
        digits = 0 if speed["tokens_per_second"] >= 100 else 1
        cells.append(f"{speed['tokens_per_second']:.{digits}f} {speed['ratio']:.2f}x")
    return cells


def _millions(row: dict[str, Any]) -> str:
    return f"{8 * row['bytes'] / row['bits_per_weight'] / 1e6:.1f}"
