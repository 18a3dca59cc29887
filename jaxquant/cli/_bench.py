"""`jaxquant bench`: float32 and recipes in one process, taking turns."""

import argparse
import os
import platform
from typing import Any

import jax

from ..evaluate import medians, Timing
from ..models import find_smollm2, open_model
from ._bench_gptq import cores, gptq_rows, gptq_table, SHAPES
from ._bench_kernels import run_kernels
from ._bench_layer import layer_sides, SHAPE
from ._bench_matrix import run_matrix
from ._bench_quantize import quantize_sides, throughput_rows, throughput_table
from ._console import bar, check_json, say, show, table, write_json
from ._sides import (
    CONTEXT,
    Decoding,
    FLOAT,
    float_side,
    prefill,
    quantized_side,
    STEPS,
    wanted_recipes,
)

COMPILED = {"kernels": run_kernels, "compile-matrix": run_matrix}
"""Benches that run nothing: they read what compilers say."""
BENCHES = ("prefill", "decode", "layer", "quantize", "gptq", *COMPILED)


def run_bench(arguments: argparse.Namespace) -> None:
    """The command."""
    check_json(arguments.json)
    name, tokens = arguments.name, None
    if name in ("layer", "quantize", "gptq", *COMPILED) and (arguments.model, arguments.recipe) != (
        None,
        None,
    ):
        raise ValueError(f"bench {name} has no model and no recipe: it is about single weights.")
    if name in COMPILED:
        return COMPILED[name](arguments)
    if name == "gptq":
        return _gptq(arguments)
    if name == "quantize":
        sides = quantize_sides(arguments.size)
        said = f"a weight of {arguments.size}x{arguments.size} in float32 to codes"
    elif name == "layer":
        sides, tokens = layer_sides(), 1
        said = f"one row times a weight of {SHAPE[0]}x{SHAPE[1]}"
    else:
        sides, tokens, said = _model_sides(arguments)
    with bar("timing") as progress:
        timings = medians(sides, rounds=arguments.rounds, progress=progress)
    say(f"{name}: {said}; {machine()}; medians of {arguments.rounds} rounds in turn")
    if tokens is None:
        rows = throughput_rows(timings, arguments.size)
        show(throughput_table(rows))
    else:
        rows = side_rows(timings, tokens)
        show(speed_table(rows))
    if name == "layer":
        say(_packed_verdict(timings))
    result = {"bench": name, "what": said, "machine": machine(), "rounds": arguments.rounds}
    result |= {"bytes": 4 * arguments.size**2} if tokens is None else {"tokens": tokens}
    write_json(arguments.json, {**result, "sides": rows})


def _gptq(arguments: argparse.Namespace) -> None:
    with bar("timing") as progress:
        rows = gptq_rows(SHAPES, rounds=arguments.rounds, progress=progress)
    said = "seconds for one weight and the Gram matrix of its inputs, int4 in groups of 64"
    say(f"gptq: {said}; {machine()}, as many threads; medians of {arguments.rounds} rounds in turn")
    show(gptq_table(rows))
    say(f"Load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.")
    result = {"bench": "gptq", "what": said, "machine": machine(), "threads": cores()}
    write_json(arguments.json, {**result, "rounds": arguments.rounds, "sides": rows})


def _model_sides(arguments: argparse.Namespace) -> tuple[dict[str, Any], int, str]:
    wanted = wanted_recipes(arguments.recipe)
    opened = open_model(arguments.model or find_smollm2())
    plain = float_side(opened)
    models = {FLOAT: plain.model}
    with bar("quantizing") as progress:
        for done, recipe in enumerate(wanted):
            progress(done, len(wanted))
            models[recipe.name] = quantized_side(opened, plain, recipe).model
    if arguments.name == "prefill":
        said = f"a prompt of {arguments.length} tokens into a cache, logits of the last"
        return {n: prefill(m, arguments.length) for n, m in models.items()}, arguments.length, said
    said = f"{STEPS} tokens one by one after {CONTEXT}"
    return {n: Decoding(m) for n, m in models.items()}, STEPS, said


def side_rows(timings: dict[str, Timing], tokens: int) -> list[dict[str, Any]]:
    """For each side: median, tokens a second, and how many times as fast as the first side."""
    first = next(iter(timings.values()))
    return [
        {
            "name": name,
            "median_seconds": timing.median,
            "tokens_per_second": tokens / timing.median,
            "ratio": timing.ratio(first),
            "seconds": list(timing.seconds),
        }
        for name, timing in timings.items()
    ]


def speed_table(rows: list[dict[str, Any]]) -> Any:
    """What `side_rows` gave, as a table."""
    made = table("side", "median", "tokens/s", f"speed / {rows[0]['name']}")
    for row in rows:
        made.add_row(
            row["name"],
            f"{1e3 * row['median_seconds']:.2f} ms",
            f"{row['tokens_per_second']:.1f}",
            f"{row['ratio']:.2f}",
        )
    return made


def machine() -> str:
    """The devices that ran it, and JAX's version."""
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        usable = getattr(os, "sched_getaffinity", None)
        count = os.cpu_count() if usable is None else len(usable(0))
        kind = f"{count} CPU cores ({platform.machine()})"
    return f"{kind}, jax {jax.__version__}"


def _packed_verdict(timings: dict[str, Timing]) -> str:
    packed, bytewise = timings["int4 g64, 2 a byte"], timings["int4 g64, 1 a byte"]
    against = packed.ratio(timings[FLOAT])
    return (
        f"Packed int4 runs at {against:.2f} times the speed of float32 here, and at "
        f"{packed.ratio(bytewise):.2f} times that of int4 held a byte each."
    )
