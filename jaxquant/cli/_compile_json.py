"""What `jaxquant compile --json` writes: names of keys, and sums that the tables show as well."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from ..aot import CompiledStep, LaidOut, Target
from ..qarray._sharding import axes_of


def compile_json(
    laid: LaidOut, steps: Mapping[str, CompiledStep], *, model: str, target: str
) -> dict[str, Any]:
    """Everything, in bytes and seconds of one device."""
    outline, plan = laid.outline, laid.plan
    found = {name: step_json(each) for name, each in steps.items()}
    return {
        "model": model,
        "source": outline.source,
        "recipe": None if plan is None else plan.recipe,
        "target": target,
        "fits": fits_side_by_side(laid.target, steps),
        "config": dataclasses.asdict(laid.config),
        "parameters": laid.parameters,
        "devices": laid.devices,
        "device": {
            "kind": laid.target.device_kind,
            "hbm_bytes": laid.target.hbm_bytes,
            "hbm_bytes_per_second": laid.target.hbm_bytes_per_second,
            "matrix_ops_per_second": dict(laid.target.matrix_ops),
            "clock_hz": laid.target.clock_hz,
        },
        "mesh": dict(laid.placement.axes),
        "placement": {
            "rules": {path: spec_json(spec) for path, spec in laid.placement.rules.items()},
            "cache": spec_json(laid.placement.cache),
            "logits": spec_json(laid.placement.logits),
        },
        "backends": [
            {"site": site, "backend": backend, "reason": reason}
            for site, backend, reason in (() if plan is None else plan.backends)
        ],
        "decode": found["decode"],
        "prefill": found.get("prefill"),
    }


def fits_side_by_side(target: Target, steps: Mapping[str, CompiledStep]) -> bool:
    """Whether each step fits, and a prefill also while the cache of decoding is held."""
    if not all(each.fits for each in steps.values()):
        return False
    return beside(steps) <= target.hbm_bytes


def beside(steps: Mapping[str, CompiledStep]) -> int:
    """Bytes of the prefill, with the cache of decoding beside it."""
    if "prefill" not in steps:
        return 0
    return total_bytes(steps["prefill"]) + steps["decode"].held["cache"]


def total_bytes(step: CompiledStep) -> int:
    """As the compiler says; where it said nothing, what the arrays take."""
    return sum(step.parts.values()) + (step.unaccounted or 0)


def spec_json(spec: PartitionSpec) -> list[list[str]]:
    """For each axis, the mesh's axes that cut it."""
    return [list(axes_of(entry)) for entry in spec]


def step_json(step: CompiledStep) -> dict[str, Any]:
    """One step: what it holds, what bounds it, what the compiler made of it."""
    return {
        "rows": step.step.rows,
        "new_tokens": step.step.new,
        "cache_length": step.step.seen or step.step.new,
        "fits": step.fits,
        "refused": step.refused,
        "bytes": step.parts,
        "bytes_of_padding": step.unaccounted,
        "bytes_in_all": total_bytes(step),
        "largest_arrays": [{"operation": name, "bytes": size} for name, size in step.largest],
        "roofline": {
            "bytes": step.roofline.bytes,
            "operations": dict(step.roofline.operations),
            "memory_seconds": step.roofline.memory_seconds,
            "compute_seconds": step.roofline.compute_seconds,
            "seconds": step.roofline.seconds,
        },
        "program": _program_json(step),
        "collectives": collectives(step),
        "collectives_of_weights": sum(each.runs for each in step.moving_weights),
        "compile_seconds": step.seconds,
    }


def _program_json(step: CompiledStep) -> dict[str, Any] | None:
    if (compiled := step.compiled) is None:
        return None
    found: dict[str, Any] = {
        "bytes_moved": compiled.hlo.bytes_moved,
        "memory_seconds": compiled.memory_bound_seconds,
        "custom_calls": dict(compiled.hlo.custom_calls),
        "schedule": None,
    }
    if compiled.schedule is not None:
        time, least = compiled.scheduled(), step.roofline.seconds
        found["schedule"] = {
            "seconds": time.seconds,
            "overlapped_seconds": overlapped(step),
            "compute_seconds": time.compute_seconds,
            "all_loops_known": time.known,
            "unknown": [each.name for each in time.steps if not each.known],
            "over_roofline": time.seconds / least,
            "overlapped_over_roofline": overlapped(step) / least,
        }
    return found


def overlapped(step: CompiledStep) -> float:
    """The schedule's seconds if all that can overlap does, which is no less than the roofline.

    Bundles may hand the matrix units more than these take, so a schedule alone may say less.
    """
    assert step.compiled is not None
    return max(step.compiled.scheduled().overlapped_seconds, step.roofline.seconds)


def collectives(step: CompiledStep) -> list[dict[str, Any]]:
    """Exchanges that are alike as one row, in the order in which the program runs them."""
    rows: dict[tuple[Any, ...], int] = {}
    weights = {each.name for each in step.moving_weights}
    for each in step.compiled.hlo.collectives if step.compiled else ():
        key = (each.kind, each.shapes, each.bytes, each.name in weights)
        rows[key] = rows.get(key, 0) + each.runs
    return [
        {"kind": kind, "shapes": list(shapes), "bytes": size, "runs": runs, "weights": carries}
        for (kind, shapes, size, carries), runs in rows.items()
    ]
