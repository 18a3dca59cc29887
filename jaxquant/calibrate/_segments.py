"""Segments: the graph of a model, cut before each group of sites that can be quantized together.

A site's *level* is how many quantized sites lie on the longest way to it. Sites of one level do not
depend on each other: q, k and v; then o; then gate and up; then down. Segment `l` computes what the
sites of level `l + 1` read, from what the sites of level `l` were given; each equation of the model
is in one segment, but for those that depend on parameters alone, which are wherever they are read.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from ..intercept import Graph, MarkedSite, Step, Value


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Equations in order, what they read from outside and what of them is wanted.

    `inputs` are in the order in which the equations first read them, so that parts which compute
    the same of other values are equal step by step.
    """

    graph: Graph
    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """What is evaluated between two levels of sites.

    `sites` are those of the next level; they read values of this segment or of earlier ones.
    `part` reads `kept` values of earlier segments, roots, constants; its outputs are what later
    segments or `sites` read. `done` are kept values that nobody reads afterwards.
    """

    level: int
    part: Part
    sites: tuple[Step, ...]
    done: tuple[int, ...]


def part_of(graph: Graph, steps: Iterable[Step], outputs: Sequence[int]) -> Part:
    """The part of these moving steps, with what they need that depends on parameters alone."""
    makers = graph.makers
    wanted: dict[int, Step] = {}

    def add(step: Step) -> None:
        stack = [step]
        while stack:
            each = stack.pop()
            if id(each) in wanted:
                continue
            wanted[id(each)] = each
            stack += [
                makers[value]
                for value in each.reads
                if value in makers and value not in graph.moving
            ]

    for step in steps:
        add(step)
    ordered = tuple(step for step in graph.steps if id(step) in wanted)
    made = {value for step in ordered for value in step.outputs}
    inputs = dict.fromkeys(v for step in ordered for v in step.reads if v not in made)
    order = {v: i for i, v in enumerate([*inputs, *(v for s in ordered for v in s.outputs)])}
    return Part(
        graph=graph,
        steps=ordered,
        inputs=tuple(inputs),
        outputs=tuple(sorted(outputs, key=lambda value: order[value])),
    )


def cut(graph: Graph, wanted: Callable[[MarkedSite], bool]) -> tuple[Segment, ...]:
    """The segments before each level of the sites that are `wanted`, in order."""
    level: dict[int, int] = dict.fromkeys(graph.arguments, 0)
    at: dict[int, int] = {}
    chosen: list[Step] = []
    for step in graph.steps:
        before = [level[value] for value in step.reads if value in graph.moving]
        if not before:
            continue
        own = max(before)
        if step.mark is not None and wanted(step.mark):
            own += 1
            chosen.append(step)
        at[id(step)] = own
        level.update(dict.fromkeys(step.outputs, own))
    needed = _needed(graph, chosen, at)
    count = max((at[id(step)] for step in chosen), default=0)
    # The last segment at which each value is read: by its equations, or as an input of its sites.
    last: dict[int, int] = {}
    for step in needed:
        for value in step.reads:
            if value in graph.moving:
                last[value] = max(last.get(value, 0), at[id(step)])
    last.update((value, count) for value in graph.outputs if value in graph.moving)
    segments = []
    for now in range(count):
        steps = [step for step in needed if at[id(step)] == now]
        made = {value for step in steps for value in step.outputs}
        kept = {v for v in last if level[v] < now or v in graph.arguments}
        segments.append(
            Segment(
                level=now,
                part=part_of(graph, steps, [v for v in made if last.get(v, -1) > now]),
                sites=tuple(step for step in chosen if at[id(step)] == now + 1),
                done=tuple(sorted(v for v in kept if last[v] == now)),
            )
        )
    return tuple(segments)


def _needed(graph: Graph, chosen: Sequence[Step], at: dict[int, int]) -> list[Step]:
    """The moving steps that the chosen sites and the model's outputs depend on, and those sites.

    With what only the outputs need, the last layer is equal to the others.
    """
    live = {value for step in chosen for value in step.reads}
    live |= {value for value in graph.outputs if isinstance(value, Value)}
    picked = {id(step) for step in chosen}
    needed = []
    for step in reversed(graph.steps):
        if id(step) in at and (id(step) in picked or any(v in live for v in step.outputs)):
            live.update(step.reads)
            needed.append(step)
    return needed[::-1]


def marked(step: Step) -> MarkedSite:
    """What a site reads."""
    assert step.mark is not None
    return step.mark


def moving_side(step: Step) -> Value:
    """The value that a site multiplies its weight with."""
    value = step.inputs[1 - marked(step).use.side]
    assert isinstance(value, Value)
    return value
