"""Reads the text of an optimized HLO module: its computations, instructions and shapes."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

_SHAPE = re.compile(
    r"\b(?P<type>[a-z]\w*)\[(?P<dims>[0-9,<= ]*)\](?:\{(?P<layout>[^{}]*)\})?", re.ASCII
)
_TYPE_BITS = re.compile(r"[a-z]+(\d+)")
_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[^\s(]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[^\s=]+) = (?P<rest>.*)$")
_NAME = re.compile(r"%([\w.<>\-]+)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One array: its element type, its size, and where and how it lies.

    `bits` are those that an element takes as it is stored: 4 for a packed `s4`. `space` is XLA's
    memory space: 0 is the device's main memory, others are on the chip or on the host.
    """

    type: str
    dims: tuple[int, ...]
    bits: int
    space: int = 0
    tile: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    """The dimensions from the fastest to the slowest."""

    @property
    def bytes(self) -> int:
        """Bytes as it lies in memory: dimensions padded to whole tiles."""
        dims = list(self.dims)
        for length, axis in zip(reversed(self.tile), self.order, strict=False):
            dims[axis] = -(-dims[axis] // length) * length
        return -(-math.prod(dims) * self.bits // 8)

    def __str__(self) -> str:
        return f"{self.type}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of HLO. `shapes` are the arrays of its result, in order, tuples taken apart."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    literal: str = ""
    """What stands between the parentheses of a parameter or a constant."""

    def attribute(self, key: str) -> str | None:
        """A number, word, or name that stands as `key=value` or `key=%value`."""
        found = re.search(rf"\b{key}=%?([\w.\-<>$]+)", self.attributes)
        return found[1] if found else None

    def names(self, key: str) -> tuple[str, ...]:
        """Computations of an attribute `key={%a, %b}` or `key=%a`."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-<>]+)", self.attributes)
        return tuple(_NAME.findall(found[1])) if found else ()

    def quoted(self, key: str) -> str | None:
        """The value of `key="value"`."""
        found = re.search(rf'\b{key}="([^"]*)"', self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
    """Instructions by name, in the order in which they run."""

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(each for each in self.instructions.values() if each.is_root)

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """The parameters, in order."""
        found = (each for each in self.instructions.values() if each.opcode == "parameter")
        return tuple(sorted(found, key=lambda each: int(each.literal)))

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """By the name of an instruction: those that read it."""
        found: dict[str, list[Instruction]] = {}
        for each in self.instructions.values():
            for name in dict.fromkeys(each.operands):
                found.setdefault(name, []).append(each)
        return {name: tuple(users) for name, users in found.items()}

    @functools.cached_property
    def continued(self) -> frozenset[str]:
        """The collectives that another fusion began.

        The TPU compiler spreads an asynchronous one over the fusions that run meanwhile, and hands
        its buffers from one to the next: each names it, the first with `AsyncCollectiveStart`.
        """
        return frozenset(
            each.name
            for each in self.instructions.values()
            if each.opcode in COLLECTIVES and "chain_id=" in each.attributes
            if not any(
                user.quoted("custom_call_target") == "AsyncCollectiveStart"
                for user in self.users.get(each.name, ())
            )
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """An HLO module: its computations by name, and the name of the one that runs."""

    computations: Mapping[str, Computation]
    entry: str


def _bits(type_: str, layout: str) -> int:
    if packed := re.search(r"E\((\d+)\)", layout):
        return int(packed[1])
    if found := _TYPE_BITS.match(type_):
        return int(found[1])
    return 8 if type_ == "pred" else 0  # token, opaque


def read_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays that a type names: `f32[8,128]{1,0:T(8,128)S(1)}`, or a tuple of such."""
    shapes = []
    for found in _SHAPE.finditer(text):
        order, _, rest = (found["layout"] or "").partition(":")
        dims = tuple(int(dim.strip("<= ")) for dim in found["dims"].split(",") if dim)
        space = re.search(r"S\((\d+)\)", rest)
        tile = re.search(r"T\(([\d,]+)\)", rest)
        shapes.append(
            Shape(
                type=found["type"],
                dims=dims,
                bits=_bits(found["type"], rest),
                space=int(space[1]) if space else 0,
                tile=tuple(map(int, tile[1].split(","))) if tile else (),
                order=tuple(map(int, order.split(","))) if order else (),
            )
        )
    return tuple(shapes)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"No parenthesis closes the one at {start} of {text[:200]!r}.")


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    rest = found["rest"]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return None
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close]
    return Instruction(
        name=found["name"],
        opcode=opcode[1],
        shapes=read_shapes(rest[:end]),
        operands=tuple(_NAME.findall(inside)),
        attributes=rest[close + 1 :],
        is_root=found["root"] is not None,
        literal=inside if opcode[1] in ("parameter", "constant") else "",
    )


def read_module(text: str) -> Module:
    """Reads what `compiled.as_text()` gives.

    **Raises:** `ValueError` if there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry, name, body = None, None, {}
    for line in text.splitlines():
        if name is None:
            if found := _HEADER.match(line):
                name, body = found["name"], {}
                entry = name if found["entry"] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name=name, instructions=body)
            name = None
        elif each := _instruction(line):
            body[each.name] = each
    if entry is None:
        raise ValueError("This text has no ENTRY computation: it is not an HLO module.")
    return Module(computations=computations, entry=entry)
