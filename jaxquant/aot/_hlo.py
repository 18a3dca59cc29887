"""Facts of a compiled program that its optimized HLO tells: what it calls, sends and moves."""

import dataclasses
import re
from collections.abc import Iterator, Mapping

from ._hlo_text import COLLECTIVES, Computation, Instruction, Module, read_module, Shape

# Nothing is read or written by these; what they hold is counted where it is used.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "opt-barrier add-dependency domain".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME_BYTES = ("bitcast", "reshape", "get-tuple-element", "opt-barrier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One exchange between devices. `bytes` is the larger of what a device gives and gets."""

    kind: str
    name: str
    bytes: int
    shapes: tuple[str, ...]
    runs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """An instruction that runs, and how it uses the main memory each time it does.

    `kernel` is the name of a Pallas kernel, or the target of a custom call.
    """

    name: str
    opcode: str
    op_name: str
    kernel: str | None
    read: int
    written: int
    on_chip: int
    """Bytes read from and written to memory on the chip (VMEM, CMEM), which `bytes` leaves out."""
    runs: int

    @property
    def bytes(self) -> int:
        """Bytes that one run moves between the main memory and the chip."""
        return self.read + self.written


@dataclasses.dataclass(frozen=True, kw_only=True)
class HloFacts:
    """What the optimized HLO of one device's program says.

    `unknown_loops` are loops whose number of turns the text does not tell: what is in them is
    counted once.
    """

    steps: tuple[Step, ...]
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]

    @property
    def bytes_moved(self) -> int:
        """Bytes between the main memory and the chip, over the whole program."""
        return sum(step.bytes * step.runs for step in self.steps)

    @property
    def bytes_on_chip(self) -> int:
        """Bytes of whole arrays in memory on the chip, over the whole program.

        XLA keeps what it materializes there while there is room; in a larger program, or on a chip
        with less of it, the same arrays are in the main memory.
        """
        return sum(step.on_chip * step.runs for step in self.steps)

    @property
    def custom_calls(self) -> Mapping[str, int]:
        """How often the program runs each kernel or custom call."""
        return self._runs(lambda step: step.kernel)

    @property
    def fusions(self) -> int:
        """How many fusions the program has, each counted once."""
        return sum(step.opcode == "fusion" for step in self.steps)

    def collective_bytes(self) -> dict[str, int]:
        """Bytes by kind of collective, over the whole program."""
        total: dict[str, int] = {}
        for each in self.collectives:
            total[each.kind] = total.get(each.kind, 0) + each.bytes * each.runs
        return total

    def _runs(self, key) -> dict[str, int]:
        total: dict[str, int] = {}
        for step in self.steps:
            if (name := key(step)) is not None:
                total[name] = total.get(name, 0) + step.runs
        return total


def _kernel(instruction: Instruction) -> str | None:
    if instruction.opcode != "custom-call":
        return None
    path = re.search(r"([^/]+)/pallas_call\b", instruction.quoted("op_name") or "")
    return path[1] if path else instruction.quoted("custom_call_target")


def _estimate(instruction: Instruction) -> int | None:
    """The bytes that a Pallas kernel says it moves (`pallas.CostEstimate`)."""
    found = re.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"', instruction.attributes)
    return int(found[1]) if found and instruction.opcode == "custom-call" else None


def _constant(computation: Computation, name: str) -> int | None:
    """The whole number that an instruction stands for, if it is a constant or a copy of one."""
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.instructions.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None


class _Walk:
    """Everything that runs, and how often, from the entry down."""

    def __init__(self, module: Module):
        self.module = module
        self.steps: list[Step] = []
        self.collectives: list[Collective] = []
        self.unknown_loops: list[str] = []

    def run(self, computation: Computation, runs: int) -> None:
        for each in computation.instructions.values():
            if each.opcode == "while":
                trips = self._trips(computation, each)
                if trips is None:
                    self.unknown_loops.append(each.name)
                for key in ("body", "condition"):
                    self._into(each.names(key), runs * (1 if trips is None else trips))
            elif each.opcode == "conditional":
                # One branch runs; which one is not known, so the one that moves most.
                self._largest_branch(each, runs)
            elif each.opcode == "call":
                self._into(each.names("to_apply"), runs)
            elif each.opcode not in _FREE and not each.opcode.endswith(("-done", "-update")):
                self._step(computation, each, runs)

    def _into(self, names: tuple[str, ...], runs: int) -> None:
        for name in names:
            self.run(self.module.computations[name], runs)

    def _largest_branch(self, instruction: Instruction, runs: int) -> None:
        keys = ("branch_computations", "true_computation", "false_computation")
        walks = []
        for name in dict.fromkeys(name for key in keys for name in instruction.names(key)):
            walk = _Walk(self.module)
            walk.run(self.module.computations[name], runs)
            walks.append(walk)
        most = max(walks, key=lambda walk: sum(step.bytes * step.runs for step in walk.steps))
        self.steps += most.steps
        self.collectives += most.collectives
        self.unknown_loops += most.unknown_loops

    def _trips(self, computation: Computation, loop: Instruction) -> int | None:
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known[1])
        condition = self.module.computations[loop.names("condition")[0]]
        test, start = condition.root, computation.instructions.get(loop.operands[0])
        if test.opcode != "compare" or test.attribute("direction") != "LT":
            return None
        first, end = (self._at_start(condition, name, computation, start) for name in test.operands)
        return None if first is None or end is None else max(0, end - first)

    def _at_start(self, condition, name, computation, start) -> int | None:
        """A number that a loop's test reads, at the start: a counter is stepped by one."""
        if (value := _constant(condition, name)) is not None:
            return value
        element = condition.instructions[name]
        if element.opcode != "get-tuple-element" or start is None or start.opcode != "tuple":
            return None
        return _constant(computation, start.operands[int(element.attribute("index") or 0)])

    def _step(self, computation: Computation, each: Instruction, runs: int) -> None:
        for kind, inner in self._exchanges(each):
            into = [s for name in inner.operands for s in self._shapes(computation, name)]
            size = max([s.bytes for s in inner.shapes] + [s.bytes for s in into])
            self.collectives.append(
                Collective(
                    kind=kind,
                    name=each.name,
                    bytes=size,
                    shapes=tuple(map(str, inner.shapes)),
                    runs=runs,
                )
            )
        read, read_on_chip = self._read(computation, each)
        written, written_on_chip = self._written(each)
        total = read + read_on_chip + written + written_on_chip
        # What a kernel says to leave of its operands: other layers of a stack.
        read -= min(read, max(0, total - (_estimate(each) or total)))
        self.steps.append(
            Step(
                name=each.name,
                opcode=each.opcode,
                op_name=each.quoted("op_name") or "",
                kernel=_kernel(each),
                read=read,
                written=written,
                on_chip=read_on_chip + written_on_chip,
                runs=runs,
            )
        )

    def _shapes(self, computation: Computation, name: str) -> tuple[Shape, ...]:
        found = computation.instructions.get(name)
        return found.shapes if found else ()

    def _exchanges(self, each: Instruction) -> Iterator[tuple[str, Instruction]]:
        """The collectives that an instruction is, or holds (a fusion, a call of another core)."""
        kind = each.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            yield kind, each
        for name in (*each.names("calls"), *each.names("to_apply")):
            inside = self.module.computations.get(name)
            if inside is None:
                continue
            begun = (x for x in inside.instructions.values() if x.name not in inside.continued)
            for inner in begun:
                for found, instruction in self._exchanges(inner):
                    # The TPU compiler writes a reduce-scatter as this fusion.
                    scatter = found == "all-reduce" and "all-reduce-scatter" in name
                    yield "reduce-scatter" if scatter else found, instruction

    def _called(self, each: Instruction) -> Computation | None:
        names = each.names("calls")
        return self.module.computations.get(names[0]) if names else None

    def _read(self, computation: Computation, each: Instruction) -> tuple[int, int]:
        """Bytes that are read of the main memory, and of memory on the chip."""
        called, total = self._called(each), (0, 0)
        for position, name in enumerate(each.operands):
            shapes = self._shapes(computation, name)
            if each.opcode.removesuffix("-start") in _SLICES and position == 0:
                part = sum(shape.bytes for shape in self._results(each))
            elif each.opcode == "dynamic-update-slice" and position == 0:
                part = 0
            elif called is not None and position < len(called.parameters):
                part = self._part_read(called, called.parameters[position])
            else:
                part = sum(shape.bytes for shape in shapes)
            there, here = _by_place([(shape, shape.bytes) for shape in shapes])
            total = (total[0] + min(there, part), total[1] + min(here, part))
        return total

    def _part_read(self, computation: Computation, value: Instruction) -> int:
        """Bytes of `value` that the computation reads: less than all where it takes a slice."""
        whole, total = sum(shape.bytes for shape in value.shapes), 0
        for user in computation.users.get(value.name, ()):
            position = user.operands.index(value.name)
            called = self._called(user)
            if user.name in computation.continued or (user.is_root and computation.continued):
                continue
            if user.opcode in _SAME_BYTES and not user.is_root:
                total += self._part_read(computation, user)
            elif user.opcode in _SLICES and position == 0:
                total += sum(shape.bytes for shape in user.shapes)
            elif user.opcode == "dynamic-update-slice" and position == 0:
                continue
            elif called is not None and position < len(called.parameters):
                total += self._part_read(called, called.parameters[position])
            else:
                return whole
        return min(whole, total)

    def _written(self, each: Instruction) -> tuple[int, int]:
        """Bytes that are written to the main memory, and to memory on the chip."""
        if each.opcode.endswith("-start"):
            return _by_place([(shape, shape.bytes) for shape in self._results(each)])
        sizes = [shape.bytes for shape in each.shapes]
        called = self._called(each)
        if each.opcode == "dynamic-update-slice":
            sizes[0] = min(sizes[0], self._update(each, None))
        elif called is not None:
            results = [called.root]
            if called.root.opcode == "tuple":
                results = [called.instructions[name] for name in called.root.operands]
            if len(results) == len(sizes):
                sizes = [
                    min(size, self._part_written(called, result))
                    for size, result in zip(sizes, results, strict=True)
                ]
        return _by_place(list(zip(each.shapes, sizes, strict=True)))

    def _part_written(self, computation: Computation, result: Instruction) -> int:
        while result.opcode in ("bitcast", "reshape"):
            result = computation.instructions[result.operands[0]]
        handed_on = result.opcode == "parameter" and bool(computation.continued)
        if handed_on or result.name in computation.continued:
            return 0
        if result.opcode == "dynamic-update-slice":
            return self._update(result, computation)
        return sum(shape.bytes for shape in result.shapes)

    def _update(self, each: Instruction, computation: Computation | None) -> int:
        for body in [computation] if computation else self.module.computations.values():
            if each.name in body.instructions:
                return sum(s.bytes for s in self._shapes(body, each.operands[1]))
        raise KeyError(each.name)

    def _results(self, each: Instruction) -> tuple[Shape, ...]:
        """What is written. The result of an asynchronous pair stands in the tuple of its start.

        A copy's is (to, from, flag), a collective's (operand, result, ...); one that is reduced
        in place has its result alone.
        """
        if each.opcode == "copy-start":
            return each.shapes[:1]
        if not each.opcode.endswith("-start") or each.opcode == "all-reduce-start":
            return each.shapes
        if len(each.shapes) == 1:
            return each.shapes
        count = len(each.operands)
        return each.shapes[count : 2 * count]


def _by_place(sizes: list[tuple[Shape, int]]) -> tuple[int, int]:
    """Bytes in the main memory, and on the chip."""
    there = sum(size for shape, size in sizes if shape.space == 0)
    return there, sum(size for _, size in sizes) - there


def hlo_facts(text: str, kernel_bytes: Mapping[str, int] | None = None) -> HloFacts:
    """Reads the facts of `compiled.as_text()`.

    **What bytes count.** Each instruction of the entry and of what it calls (bodies of loops times
    their turns) reads its operands from the main memory and writes its result to it, as they lie
    there: padded to tiles, `s4` at half a byte. Free are arrays that stand in memory on the chip
    (another memory space), parameters, constants, tuples and bitcasts. A slice, a gather and a
    fusion that takes one read what they take; an update in place writes what it updates. Inside a
    fusion nothing else is counted. An asynchronous pair is counted at its start, and so is a
    collective that the TPU compiler spreads over several fusions.

    A custom call counts each operand and each result once, but no more than a Pallas kernel says
    that it moves: of stacked weights it reads one layer. A kernel whose blocks come back
    reads them again, which HLO does not say: `kernel_bytes` gives, by the kernel's name, the bytes
    of one run, and replaces that count.

    **Raises:** `ValueError` if the text is no HLO module, or if it runs no kernel of a name in
    `kernel_bytes`.
    """
    module = read_module(text)
    walk = _Walk(module)
    walk.run(module.computations[module.entry], 1)
    given = dict(kernel_bytes or {})
    kernels = {step.kernel for step in walk.steps if step.kernel}
    if missing := sorted(set(given) - kernels):
        raise ValueError(
            f"Bytes are given for the kernels {missing}, which the program does not run. It runs "
            f"{sorted(kernels)}."
        )
    steps = tuple(
        dataclasses.replace(step, read=given[step.kernel], written=0)
        if step.kernel in given
        else step
        for step in walk.steps
    )
    return HloFacts(
        steps=steps,
        collectives=tuple(walk.collectives),
        unknown_loops=tuple(walk.unknown_loops),
    )
