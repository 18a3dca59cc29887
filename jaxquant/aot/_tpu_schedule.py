"""Reads the schedule that libtpu makes: bundles, loops, units and spills of each instruction.

A TPU core runs bundles, one a cycle when nothing stalls. libtpu writes, for every instruction of
the optimized HLO that has code of its own, a listing of bundles (`*-final_bundles.txt`) and the
slots that each bundle takes of each unit (`*-final_hlo-static-per-bundle-utilization.txt`).

On chips with two cores (v4, v5p) the listing is of one of them: where XLA or a `parallel` grid
dimension splits the work, the exit tests count that core's part, and both run at once. So cycles
need no division; work that is not split runs on one core while the other waits, and shows whole.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?P<label>[A-Z]{2})?\s*:\s*(?P<depth>(?:>\s?)*)\{")
_FILE = re.compile(r"^\d+-(?P<name>.+)-\d+-final_bundles\.txt$")
_UTILIZATION = "-final_hlo-static-per-bundle-utilization.txt"
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %(?P<counter>\w+), (?P<end>\d+) /\* loop exit test")
_PREDICATE = re.compile(r"%(\w+) = scmp\.\S+ [^;]*/\* loop exit test")
_BRANCH = re.compile(r"sbr\.rel \(!?%\w+\) target = \$region(\d+)")
_GRID = re.compile(r"^iteration_bounds: \(([\d, ]+)\)", re.MULTILINE)
_MAP = re.compile(
    r"^key:(?P<key>.+)\nordinal:.*\nequivalent_hlos.*\n(?P<names>(?: {2}.+\n)*)", re.M
)

SPILLS = ("VLOAD:FILL", "VSTORE:SPILL")
"""The columns of the utilization that move registers to and from memory for want of registers."""

# The jump back of a loop stands at most this many bundles behind it.
_NEAR = 4

# A pipeline of two buffers runs this many turns more than its grid has steps, at most.
_PROLOGUE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """One loop of a program, without the loops inside it.

    `steps` are the turns in which the whole body runs. A pipeline takes up to two `turns` more to
    fill and drain, in which `skipped` of its bundles are jumped over. Both are None where the
    listing does not tell (a bound in a register). Code under a condition is counted as run:
    `conditional` are the bundles of each stretch of the body that a jump may pass over, in order,
    without those inside another. `grid` is what the steps of a pipeline go over, outermost first.
    """

    depth: int
    bundles: int
    turns: int | None
    steps: int | None
    skipped: int
    used: Mapping[str, int]
    """Slots that the body takes of each unit."""
    inner: tuple["Loop", ...] = ()
    grid: tuple[int, ...] | None = None
    conditional: tuple[int, ...] = ()

    @property
    def cycles(self) -> int:
        """Cycles of all turns, inner loops included; unknown turns count as one."""
        turns = 1 if self.turns is None else self.turns
        steps = turns if self.steps is None else self.steps
        body = self.bundles + sum(loop.cycles for loop in self.inner)
        return body * steps + (self.bundles - self.skipped) * (turns - steps)

    @property
    def known(self) -> bool:
        """Whether the turns of this loop and of those inside are known."""
        return self.turns is not None and all(loop.known for loop in self.inner)

    def walk(self) -> tuple["Loop", ...]:
        """This loop and those inside it."""
        return (self, *(each for loop in self.inner for each in loop.walk()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The code of one instruction. `capacity` is what a bundle can hold of each unit."""

    name: str
    bundles: int
    outside: int
    """Bundles outside of loops."""
    loops: tuple[Loop, ...]
    capacity: Mapping[str, int]
    used: Mapping[str, int]
    """Slots taken of each unit, each bundle counted once."""

    @property
    def cycles(self) -> int:
        """Bundles times turns: one bundle a cycle, when nothing stalls.

        A lower bound where a loop's turns are unknown (`known` is False): it counts as one.
        """
        return self.outside + sum(loop.cycles for loop in self.loops)

    @property
    def known(self) -> bool:
        """Whether all turns are known."""
        return all(loop.known for loop in self.loops)

    @property
    def hottest(self) -> Loop | None:
        """The loop whose own bundles take most cycles."""
        loops = [each for loop in self.loops for each in loop.walk()]
        alone = [dataclasses.replace(each, inner=()) for each in loops]
        return max(alone, key=lambda loop: loop.cycles, default=None)

    @property
    def spills(self) -> int:
        """Loads and stores, anywhere in the code, that spare registers."""
        return sum(self.used.get(name, 0) for name in SPILLS)

    def utilization(self, loop: Loop | None = None) -> dict[str, float]:
        """Share of the slots of each unit that the loop (or all the code) takes."""
        used, bundles = (self.used, self.bundles) if loop is None else (loop.used, loop.bundles)
        return {
            name: used.get(name, 0) / (bundles * slots) if bundles and slots else 0.0
            for name, slots in self.capacity.items()
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuSchedule:
    """Programs by the names of the instructions that run them.

    `top_level` is the code around them: it starts and ends the program, and its loops are those
    of the HLO. Instructions whose code is a few bundles stand in it and are not in `programs`.
    """

    programs: Mapping[str, Program]
    top_level: Program | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Line:
    depth: int
    label: str | None
    text: str


def _lines(text: str) -> list[_Line]:
    """Bundles in order. A comment of a bundle may run over several lines of the file."""
    found: list[_Line] = []
    for line in text.splitlines():
        if bundle := _BUNDLE.match(line):
            depth, rest = bundle["depth"].count(">"), line[bundle.end() :]
            if rest.startswith("}") and found:
                # An empty bundle waits for the one before it, and is printed without a depth.
                depth = found[-1].depth
            found.append(_Line(depth=depth, label=bundle["label"], text=rest))
        elif found:
            last = found[-1]
            found[-1] = dataclasses.replace(last, text=f"{last.text}\n{line}")
    return found


def _end(lines: list[_Line], first: int) -> int:
    """The first bundle behind the loop that starts at `first`.

    A bundle is printed at the depth of one of its instructions: in the tail of a loop there are
    some that start what follows it, at less. The loop lasts while deeper ones come back.
    """
    depth, end = lines[first].depth, first + 1

    for i in range(first + 1, len(lines)):
        if lines[i].label == "LB" and lines[i].depth <= depth:
            break
        if lines[i].depth >= depth:
            end = i + 1
    # The jump back, and the bundles that wait for it, may stand behind the last at this depth.
    if exit_ := _PREDICATE.search("\n".join(line.text for line in lines[first:end])):
        back = f"sbr.rel (!%{exit_[1]})"
        inside = any(back in line.text for line in lines[first:end])
        for i in range(end, min(end + _NEAR, len(lines)) if not inside else end):
            if back in lines[i].text:
                end = i + 1
                while end < len(lines) and lines[end].text.startswith("}"):
                    end += 1
                break
    return end


def _turns(lines: list[_Line], first: int, own: str) -> int | None:
    """How often the body runs, from its exit test: a counter that grows by one from a constant."""
    found = _EXIT.search(own)
    if found is None:
        return None
    step = re.search(rf"%{found['counter']} = sadd\.s32 1, %(\w+)", own)
    phi = step and re.search(rf"%{step[1]} = sphi %(\w+), %\w+", own)
    before = "\n".join(line.text for line in lines[:first])
    start = phi and re.search(rf"%{phi[1]} = smov (\d+) ", before)
    return int(found["end"]) - int(start[1]) if start else None


def _jumps(lines: list[_Line], own: list[int]) -> list[range]:
    """What each jump forward in the body passes over, in order."""
    found = []
    for i in own:
        for target in _BRANCH.findall(lines[i].text):
            mark = re.compile(rf"Start/End empty region {target}\b")
            ends = (j for j in own if j > i and mark.search(lines[j].text))
            if (end := next(ends, None)) is not None:
                found.append(range(i + 1, end))
    return found


def _skipped(lines: list[_Line], own: list[int]) -> tuple[int, tuple[int, ...]]:
    """Bundles of the longest jump forward in the body, which passes what fills and drains a
    pipeline skip; and of those inside it, the outermost alone."""

    def count(jump: range) -> int:
        return sum(j in jump for j in own)

    jumps = _jumps(lines, own)
    longest = max(jumps, key=count, default=range(0))
    inside: list[range] = []
    for jump in jumps:
        if jump.start > longest.start and jump.stop <= longest.stop:
            if not inside or jump.start >= inside[-1].stop:
                inside.append(jump)
    return count(longest), tuple(count(jump) for jump in inside)


def _sum(rows: list[dict[str, int]], indices: list[int]) -> dict[str, int]:
    names = rows[0] if rows else {}
    return {name: sum(rows[i][name] for i in indices if i < len(rows)) for name in names}


def _loops(
    lines: list[_Line], start: int, stop: int, rows: list[dict[str, int]]
) -> tuple[list[Loop], list[int]]:
    """The outermost loops of a stretch of bundles, and the bundles outside of them."""
    loops, outside, i = [], [], start
    while i < stop:
        if lines[i].label != "LB":
            outside.append(i)
            i += 1
            continue
        end = min(_end(lines, i), stop)
        inner, rest = _loops(lines, i + 1, end, rows)
        loops.append(_loop(lines, [i, *rest], inner, rows))
        i = end
    return loops, outside


def _loop(
    lines: list[_Line], own: list[int], inner: list[Loop], rows: list[dict[str, int]]
) -> Loop:
    text = "\n".join(lines[i].text for i in own)
    turns = steps = _turns(lines, own[0], text)
    grids = {tuple(map(int, found.split(","))) for found in _GRID.findall(text)}
    grid = min(grids) if len(grids) == 1 else None
    if turns is None and grid and (end := _EXIT.search(text)):
        # Where the counter was moved to memory its start is not read. A pipeline's is 0.
        turns = int(end["end"])
        turns = turns if 0 <= turns - math.prod(grid) <= _PROLOGUE else None
    if turns is not None and grid and 0 <= turns - math.prod(grid) <= _PROLOGUE:
        steps = math.prod(grid)
    else:
        grid = None
    skipped, conditional = _skipped(lines, own)
    return Loop(
        depth=lines[own[0]].depth,
        bundles=len(own),
        turns=turns,
        steps=steps,
        skipped=skipped,
        used=_sum(rows, own),
        inner=tuple(inner),
        grid=grid,
        conditional=conditional,
    )


def read_program(name: str, bundles: str, utilization: str = "") -> Program:
    """Reads one listing, and the file of slots beside it.

    **Raises:** `ValueError` if the listing has no bundles.
    """
    lines = _lines(bundles)
    if not lines:
        raise ValueError(
            f"The listing of {name} has no bundles. This version of libtpu may write them in "
            "another form; jaxquant reads those of 0.0.42."
        )
    capacity, rows = _read_utilization(utilization)
    loops, outside = _loops(lines, 0, len(lines), rows)
    return Program(
        name=name,
        bundles=len(lines),
        outside=len(outside),
        loops=tuple(loops),
        capacity=capacity,
        used=_sum(rows, list(range(len(rows)))),
    )


def _read_utilization(text: str) -> tuple[dict[str, int], list[dict[str, int]]]:
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith("MXU")), None)
    if head is None:
        return {}, []
    names = [name.strip() for name in lines[head].split(",")]
    capacity = dict(zip(names, map(int, lines[head + 1].split()), strict=True))
    rows = [line.split() for line in lines[head + 2 :] if re.match(r"\s*\d", line)]
    return capacity, [dict(zip(names, map(int, row), strict=True)) for row in rows]


def read_schedule(folder: pathlib.Path) -> TpuSchedule:
    """Reads what one compilation left in the folder that libtpu dumps to.

    **Raises:** `ValueError` if there is no listing.
    """
    programs: dict[str, Program] = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        if found := _FILE.match(path.name):
            name = found["name"]
            stamp = path.name.removesuffix("-final_bundles.txt").rpartition("-")[0]
            beside = next(iter(folder.glob(f"{_escaped(stamp)}-*{_UTILIZATION}")), None)
            programs[name] = read_program(
                name, path.read_text(), beside.read_text() if beside else ""
            )
    if not programs:
        raise ValueError(
            f"libtpu wrote no schedules ({len(list(folder.iterdir()))} files). Its flags are read "
            "when it is loaded: is LIBTPU_INIT_ARGS set to something that overrides them?"
        )
    for path in folder.glob("*-deduplication-map.txt"):
        for found in _MAP.finditer(path.read_text()):
            if (program := programs.get(found["key"])) is not None:
                for name in found["names"].split():
                    programs.setdefault(name, program)
    inner = {name: each for name, each in programs.items() if not name.startswith(("TLP", "<"))}
    return TpuSchedule(programs=inner, top_level=programs.get("TLP"))


def _escaped(name: str) -> str:
    """A name as a pattern of `glob` that matches it alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)
