"""`jaxquant compile`: what a model would need on a slice that is not here, by its compiler."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from .. import recipes
from ..aot import (
    compile_step,
    Compiled,
    CompiledStep,
    DecoderStep,
    LaidOut,
    lay_out,
    parse_target,
    ScheduledTime,
)
from ..models import read_outline
from ._compile_json import (
    beside,
    collectives,
    compile_json,
    fits_side_by_side,
    overlapped,
    total_bytes,
)
from ._console import bar, check_json, say, show, table, write_json
from ._inspect import size_text

Steps = dict[str, CompiledStep]


def run_compile(arguments: argparse.Namespace) -> None:
    """The command."""
    check_json(arguments.json)
    _run_on_the_cpu()
    target, shape = parse_target(arguments.target)
    recipe = None if arguments.recipe is None else recipes.find(arguments.recipe)
    outline = read_outline(arguments.model)
    rows, new = arguments.prefill or (1, arguments.length)
    wanted = {"decode": DecoderStep(rows=arguments.batch, new=1, seen=arguments.length)}
    if new:
        wanted["prefill"] = DecoderStep(rows=rows, new=new, seen=0)
    laid = lay_out(outline, recipe, target, shape, batch=arguments.batch, length=arguments.length)
    steps: Steps = {}
    with bar("compiling") as progress:
        for name, step in wanted.items():
            progress(len(steps), len(wanted))
            steps[name] = compile_step(laid, step, schedule=target.platform == "tpu")
    result = compile_json(laid, steps, model=str(arguments.model), target=arguments.target)
    _say_what(laid, result)
    show(_cut_table(laid))
    show(_bytes_table(steps))
    show(_time_table(laid, steps))
    show(_exchange_table(steps))
    for line in _verdict(laid, steps):
        say(line)
    write_json(arguments.json, result)


def _run_on_the_cpu() -> None:
    """Has JAX leave the libraries of other chips to their compilers.

    **Raises:** `ValueError` if the user wants it to run elsewhere.
    """
    config: Any = jax.config
    if config.jax_platforms not in (None, "", "cpu"):
        raise ValueError(
            f"JAX is set to run on {config.jax_platforms!r}, and compiling for chips that are not "
            "here wants the CPU alone. Unset JAX_PLATFORMS, or set it to cpu."
        )
    jax.config.update("jax_platforms", "cpu")


def prefill_of(text: str) -> tuple[int, int]:
    """`"4x512"`: rows and tokens of a prompt. `"512"` is one row, `"none"` no prefill.

    **Raises:** `argparse.ArgumentTypeError` for anything else.
    """
    if text == "none":
        return 1, 0
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKENS, ROWSxTOKENS or none")
    rows, tokens = (1, *map(int, parts))[-2:]
    return rows, tokens


def _say_what(laid: LaidOut, result: dict[str, Any]) -> None:
    held = f"by {result['recipe']}" if result["recipe"] else "in bfloat16"
    say(f"{result['model']} ({laid.outline.source}): {result['parameters']:,} parameters {held}")
    mesh = ", ".join(f"{name}={size}" for name, size in laid.placement.axes.items())
    say(
        f"{result['target']}: {laid.devices} x {laid.target.device_kind}, "
        f"{size_text(laid.target.hbm_bytes)} each, as a mesh {mesh}"
    )


def _cut_table(laid: LaidOut) -> Any:
    """What is cut, and by which axes of the mesh; what is not listed is whole on each device."""
    made = table("array", "cut by")
    for path, spec in laid.placement.rules.items():
        if any(spec) and (laid.config.qkv_bias or not path.endswith("bias")):
            made.add_row(path, spec_text(spec))
    made.add_row("cache: rows, tokens, key heads, size", spec_text(laid.placement.cache))
    return made


def spec_text(spec: PartitionSpec) -> str:
    """A spec as short text: `(rest, -, kv, -)`."""
    names = ["+".join(e) if isinstance(e, tuple) else e or "-" for e in spec]
    return f"({', '.join(names)})"


def uneven_scales(laid: LaidOut) -> list[str]:
    """Parameters, layers taken together, whose scales cannot be cut as their codes are."""
    leaves = () if laid.plan is None else laid.plan.leaves
    found = [re.sub(r"/\d+/", "/*/", leaf.path) for leaf in leaves if leaf.replicated]
    return list(dict.fromkeys(found))


def _title(name: str, step: DecoderStep) -> str:
    if step.seen:
        return f"{name} {step.rows}x{step.new} after {step.seen}"
    return f"{name} {step.rows}x{step.new}"


def _bytes_table(steps: Steps) -> Any:
    made = table("bytes a device", *(_title(n, each.step) for n, each in steps.items()))
    parts = {name: each.parts for name, each in steps.items()}
    for kind in dict.fromkeys(kind for each in parts.values() for kind in each):
        sizes = (each.get(kind) for each in parts.values())
        made.add_row(kind, *("" if size is None else size_text(size) for size in sizes))
    added = [each.unaccounted for each in steps.values()]
    made.add_row("padding to tiles", *("" if n is None else size_text(n) for n in added))
    made.add_row("in all", *(size_text(total_bytes(each)) for each in steps.values()))
    return made


def _time_table(laid: LaidOut, steps: Steps) -> Any:
    made = table("bounds of a step", *(_title(n, each.step) for n, each in steps.items()))
    bandwidth = f"{laid.target.hbm_bytes_per_second / 1e9:,.0f} GB/s"

    def row(label: str, function: Callable[[CompiledStep], str]) -> None:
        made.add_row(label, *(function(each) for each in steps.values()))

    row("bytes that it has to move", lambda s: size_text(s.roofline.bytes))
    row(f"  at {bandwidth}", lambda s: _time(s.roofline.memory_seconds))
    row("operations", lambda s: _operations(s.roofline.operations))
    row("  at the matrix units' rate", lambda s: _time(s.roofline.compute_seconds))
    row("roofline: the longer", lambda s: _time(s.roofline.seconds))
    row("bytes that the program moves", lambda s: _of(s, lambda c: size_text(c.hlo.bytes_moved)))
    row(f"  at {bandwidth}", lambda s: _of(s, lambda c: _time(c.memory_bound_seconds)))
    if any(each.compiled and each.compiled.schedule for each in steps.values()):
        bundles = "bundles of the schedule, at the clock"
        row(bundles, lambda s: _scheduled(s, lambda time: time.compute_seconds))
        row("scheduled, all overlapped", lambda s: _scheduled(s, lambda time: overlapped(s)))
        row("scheduled, one by one", lambda s: _scheduled(s, lambda time: time.seconds))
        row("scheduled / roofline", _over)
    return made


def _of(step: CompiledStep, function: Callable[[Compiled], str]) -> str:
    return "" if step.compiled is None else function(step.compiled)


def _scheduled(step: CompiledStep, seconds: Callable[[ScheduledTime], float]) -> str:
    """At least so much, where the turns of a loop could not be read."""

    def text(compiled: Compiled) -> str:
        time = compiled.scheduled()
        return f"{'' if time.known else '>= '}{_time(seconds(time))}"

    return _of(step, text)


def _over(step: CompiledStep) -> str:
    def text(compiled: Compiled) -> str:
        seconds, least = compiled.scheduled().seconds, step.roofline.seconds
        return f"{overlapped(step) / least:.2f} to {max(seconds / least, 1.0):.2f}"

    return _of(step, text)


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"


def _operations(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{n / 1e9:,.1f} G {type_}" for type_, n in counts.items())


def _exchange_table(steps: Steps) -> Any:
    made = table("collectives of one device", "array", "runs", "each", "in all", "carries")
    for name, step in steps.items():
        for each in collectives(step):
            made.add_row(
                f"{name}: {each['kind']}",
                _arrays(each["shapes"]),
                str(each["runs"]),
                size_text(each["bytes"]),
                size_text(each["bytes"] * each["runs"]),
                "weights" if each["weights"] else "values",
            )
    return made


def _arrays(shapes: Sequence[str]) -> str:
    """The first array, and how many there are; flags of an asynchronous pair are none."""
    arrays = [shape for shape in shapes if not shape.startswith("u32[]")]
    return arrays[0] if len(arrays) == 1 else f"{arrays[0]}, {len(arrays) - 1} more"


def _verdict(laid: LaidOut, steps: Steps) -> list[str]:
    lines = []
    memory = size_text(laid.target.hbm_bytes)
    for name, each in steps.items():
        if each.refused is not None:
            lines.append(f"{name} does not fit: {each.refused}")
        elif not each.fits:
            lines.append(f"{name} does not fit: {size_text(total_bytes(each))} of {memory}")
        else:
            lines.append(f"{name} fits: {size_text(total_bytes(each))} of {memory} a device")
        if each.moving_weights:
            moved = sum(c.bytes * c.runs for c in each.moving_weights)
            lines.append(f"{name} moves {size_text(moved)} of weights between devices in each step")
    if "prefill" in steps and all(each.fits for each in steps.values()):
        verb = "fits" if fits_side_by_side(laid.target, steps) else "does not fit"
        lines.append(f"prefill beside the cache of decode {verb}: {size_text(beside(steps))}")
    for path in uneven_scales(laid):
        lines.append(f"all scales of {path} lie on every device: shards cut groups of its codes")
    for name, each in steps.items():
        if each.compiled and each.compiled.schedule and not each.compiled.scheduled().known:
            unread = sum(not step.known for step in each.compiled.scheduled().steps)
            lines.append(f"{name}: loops of {unread} instructions could not be read, counted once")
    if any(each.compiled for each in steps.values()):
        lines.append(
            "Compiled for, not run: schedules have no stalls, and no time of exchanges, in them"
        )
    return lines
