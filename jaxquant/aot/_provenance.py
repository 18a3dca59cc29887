"""Which exchanges of a compiled program carry weights, and not what is computed with them."""

from collections.abc import Callable
from typing import Any

from ._hlo_text import COLLECTIVES, Computation, Instruction, Module, read_module

Sources = frozenset[bool]
"""Whether the arguments that a value is made of are weights. A tuple has a tuple of these."""

_NONE: Sources = frozenset()


def _flat(sources: Any) -> Sources:
    return _NONE.union(*_parts(sources))


def _parts(sources: Any) -> list[Sources]:
    if isinstance(sources, tuple):
        return [part for each in sources for part in _parts(each)]
    return [sources]


def _joined(one: Any, other: Any) -> Any:
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return tuple(map(_joined, one, other))
    return _flat(one) | _flat(other)


class _Walk:
    def __init__(self, module: Module):
        self.module = module
        self.found: set[str] = set()

    def run(self, computation: Computation, given: tuple[Any, ...], step: str | None) -> Any:
        """What the result is made of. `step` is the instruction that all of this is part of."""
        known: dict[str, Any] = {}
        for each in computation.instructions.values():
            operands = tuple(known.get(name, _NONE) for name in each.operands)
            known[each.name] = self._sources(each, operands, given, step)
        return known[computation.root.name]

    def _sources(self, each: Instruction, operands: Any, given: Any, step: str | None) -> Any:
        if each.opcode == "parameter":
            return given[int(each.literal)]
        if each.opcode == "tuple":
            return operands
        if each.opcode == "get-tuple-element" and isinstance(operands[0], tuple):
            return operands[0][int(each.attribute("index") or 0)]
        if each.opcode == "while":
            return self._loop(each, operands[0], step)
        if each.opcode == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            names = [name for key in keys for name in each.names(key)]
            results = [
                self.run(self.module.computations[name], (argument,), step)
                for name, argument in zip(names, operands[1:], strict=True)
            ]
            for other in results[1:]:
                results[0] = _joined(results[0], other)
            return results[0]
        if each.opcode == "call":
            (name,) = each.names("to_apply")
            return self.run(self.module.computations[name], operands, step)
        sources = _flat(operands)
        own = step or each.name
        if each.opcode.removesuffix("-start") in COLLECTIVES:
            # XLA joins several exchanges into one: each operand counts by itself.
            if any(part == {True} for operand in operands for part in _parts(operand)):
                self.found.add(own)
        for name in each.names("calls"):
            inside = self.module.computations[name]
            if len(inside.parameters) == len(operands):
                return self.run(inside, operands, own)
        return sources

    def _loop(self, each: Instruction, start: Any, step: str | None) -> Any:
        (body,) = each.names("body")
        held = start
        while (after := _joined(held, self.run(self.module.computations[body], (held,), step))) != (
            held
        ):
            held = after
        return held


def carriers_of_weights(text: str, is_weight: Callable[[str], bool]) -> frozenset[str]:
    """The names of the collectives that move weights, in an optimized HLO.

    A collective moves weights if something that it sends is made of weights alone, gathered,
    dequantized or otherwise; what is computed from tokens or a cache as well is an activation.
    `is_weight` tells it of an argument by the name that `jit` gave it: `weights[0].codes`.

    **Raises:** `ValueError` if no argument is a weight by its name.
    """
    module = read_module(text)
    entry = module.computations[module.entry]
    names = [(each.quoted("op_name") or "").replace("\\'", "'") for each in entry.parameters]
    weights = [is_weight(name) for name in names]
    if not any(weights):
        raise ValueError(
            f"None of the {len(names)} arguments of this program is a weight by its name; the "
            f"first are {names[:3]}."
        )
    walk = _Walk(module)
    walk.run(entry, tuple(frozenset({weight}) for weight in weights), None)
    return frozenset(walk.found)
