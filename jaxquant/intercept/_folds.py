"""Folds: vectors that the inputs of sites can be divided by without a change of the model.

If the inputs of some sites are multiplied by `1 / s`, channel by channel, and the rows of their
weights by `s`, nothing changes. The factor `1 / s` is free of charge where the inputs come from
parameters in proportion: scale and bias of a norm, or columns of the linear layer before. Which
these are is read off the graph, by no name: each parameter's channels are followed through the
equations (`_channels`) until a site sums over them, or something else than a product does.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from ._channel_rules import apply_rule, fixed_along, gathered, Operands, product_of_axes
from ._channels import any_in, Book, Channels, FREE, free, ZERO
from ._fold import Fold, SiteRef, Source
from ._graph import Graph, Step, Value
from ._mark import Root
from ._roles import ragged_axes
from ._stored import Stored, stored_axes

# A larger array that no site reads is no norm's; its channels are not followed one by one.
_LARGEST = 1 << 20


def find_folds(graph: Graph) -> tuple[Fold, ...]:
    """Every fold of a model, in the order of its sites.

    Parameters that are read more than once (a tied embedding) neither absorb nor are sources, nor
    are inputs scaled that also go elsewhere (a residual, an output, a nonlinearity other than
    `relu` and its like, which are proportional for `s > 0`). Where two sources could serve (two
    factors of a product) it is the one with more channels, else the last factor. The call that was
    traced computes the same after folding; other methods of the model are not looked at.
    """
    return _Walk(graph).folds()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _End:
    """Channels that arrive at the weight of a site, or come from a parameter, in stored order."""

    root: Root
    channels: Channels
    stored: Stored | None
    experts: int | None = None  # The stored axis of these, where rows are dealt out to them.
    site: str = ""


class _Walk:
    """One pass over the steps of a graph, with the channels of all parameters at once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.book = Book()
        self.channels: dict[int, Channels] = {}
        self.sources: list[_End] = []
        self.sites: list[_End] = []
        self.returned = {x for x in graph.outputs if isinstance(x, Value)}
        self.steps = _live(graph)
        self.users: dict[int, list[Step]] = {}
        for step in self.steps:
            for value in step.reads:
                self.users.setdefault(value, []).append(step)
        self.kernels = self._kernels()
        for step in self.steps:
            self._step(step)
        for value in graph.outputs:
            self.book.fix(self._read(value))

    def _kernels(self) -> set[int]:
        """The sites (by their result) whose weight nothing else reads; others get channels here."""
        kernels, shared = set(), self._shared_paths()
        for value, root in self.graph.roots.items():
            if root.path in shared or len(self.users.get(value, [])) != 1:
                continue
            site = self._only_site(value, root)
            shape = tuple(self.graph.avals[value].shape)
            if site is not None:
                kernels.add(site)
            elif 1 < math.prod(shape) <= _LARGEST:
                self.channels[value] = self.book.new(shape)
                self.sources.append(_End(root=root, channels=self.channels[value], stored=None))
        return kernels

    def _only_site(self, value: int, root: Root) -> int | None:
        """The result of the site that is all that comes of a parameter, through views of it."""
        while value not in self.returned:
            match self.users.get(value, []):
                case [Step(mark=None, outputs=(view,), reads=(_,))]:
                    value = view
                case [Step(outputs=(out,)) as step] if _reads_weight(step, root):
                    return out
                case _:
                    return None
        return None

    def _shared_paths(self) -> set[str]:
        """Stacked parameters that are read as a whole too, or sliced in several ways."""
        ways: dict[str, set[tuple[int, ...]]] = {}
        for value, root in self.graph.roots.items():
            if value in self.users or value in self.returned:
                ways.setdefault(root.path, set()).add(tuple(axis for axis, _ in root.steps))
        return {path for path, found in ways.items() if len(found) > 1}

    def _read(self, x: Any) -> Channels:
        if isinstance(x, Value):
            found = self.channels.get(x)
            return (
                free(len(self.graph.avals[x].shape)) if found is None else self.book.resolve(found)
            )
        zero = np.ndim(x.val) == 0 and bool(x.val == 0)
        return free(len(x.aval.shape), ZERO if zero else FREE)

    def _step(self, step: Step) -> None:
        avals = [self.graph.avals[x] if isinstance(x, Value) else x.aval for x in step.inputs]
        read = [self._read(x) for x in step.inputs]
        if step.mark is not None:
            outputs = [self._site(step, read, [tuple(a.shape) for a in avals])]
        elif all((channels == FREE).all() for channels in read):
            return
        else:
            moving = self.graph.moving
            operands = Operands(
                channels=read,
                shapes=[tuple(aval.shape) for aval in avals],
                settled=[not (isinstance(x, Value) and x in moving) for x in step.inputs],
            )
            outputs = apply_rule(self.book, step.eqn, operands)
        for value, channels in zip(step.outputs, outputs, strict=True):
            if (channels != FREE).any():
                self.channels[value] = channels

    def _site(self, step: Step, read: list[Channels], shapes: list[tuple[int, ...]]) -> Channels:
        """Takes up the channels of a site's input; gives those of its weight's columns."""
        mark = step.mark
        assert mark is not None
        use, out = mark.use, self.graph.avals[step.outputs[0]]
        stored = stored_axes(use.weight, mark.root, use.roles) if use.roles else None
        owned = step.outputs[0] in self.kernels and stored is not None
        experts, sizes, taken = None, -1, None
        if use.op == "ragged_dot" and stored is not None and isinstance(step.inputs[2], Value):
            axes = ragged_axes(step.eqn)
            assert not isinstance(axes, str)
            experts, sizes = stored.axis_of(axes[1][0]), int(step.inputs[2])
        if owned and use.op != "take":
            taken = _columns(self.book, step, use, read, shapes)
        for i, channels in enumerate(read):
            if taken is None or taken[0] != i:
                self.book.fix(channels)
        if taken is not None and stored is not None:
            channels = taken[1]
            if (self.book.sizes(channels) != sizes).any() or experts is None:
                self.book.share(channels)
            self.sites.append(
                _End(
                    root=mark.root,
                    channels=stored.from_present(channels),
                    stored=stored,
                    experts=experts,
                    site=mark.site,
                )
            )
        if not owned or stored is None:
            return free(len(out.shape))
        ids, present = stored.new(self.book, use.op, sizes)
        self.sources.append(_End(root=mark.root, channels=ids, stored=stored, experts=experts))
        return _rows(self.book, step, use, present, shapes, len(out.shape))

    def folds(self) -> tuple[Fold, ...]:
        """What came of the walk."""
        taken = [np.maximum(self.book.resolve(end.channels), FREE) for end in self.sites]
        group_of, leaders = self._groups(taken)
        sources: dict[int, list[tuple[_End, Channels]]] = {leader: [] for leader in leaders}
        for end in self.sources:
            channels = np.maximum(self.book.resolve(end.channels), FREE)
            for leader in np.unique(group_of[channels[channels >= 0]]):
                if leader >= 0:
                    sources[int(leader)].append((end, channels))
        found = []
        for leader, members in leaders.items():
            group = [(self.sites[i], taken[i]) for i in members]
            fold = self._fold(group, sources[leader])
            if fold is not None:
                found.append(fold)
        return tuple(found)

    def _groups(self, taken: list[Channels]) -> tuple[np.ndarray, dict[int, list[int]]]:
        """Sites that have channels in common, directly or through others, by the first of them.

        Also the group of each channel, -1 where it is in none.
        """
        owner = np.full(len(self.book), -1, np.int32)
        leader = np.arange(len(taken), dtype=np.int32)
        for i, channels in enumerate(taken):
            own = channels[channels >= 0]
            met = np.unique(leader[owner[own][owner[own] >= 0]])
            if len(met):
                leader[np.isin(leader, met)] = met[0]
                leader[i] = met[0]
            owner[own] = i
        groups: dict[int, list[int]] = {}
        for i, channels in enumerate(taken):
            if any_in(channels):
                groups.setdefault(int(leader[i]), []).append(i)
        owner[owner >= 0] = leader[owner[owner >= 0]]
        return owner, groups

    def _fold(
        self, group: list[tuple[_End, Channels]], ends: list[tuple[_End, Channels]]
    ) -> Fold | None:
        """The fold of these sites; `None` where they do not read the same inputs in one order.

        Nor is there one where all inputs would have one factor, which moves no outlier.
        """
        matrices = [end.stored.matrix(channels) for end, channels in group if end.stored]
        first = matrices[0]
        if any(m.shape != first.shape or (m != first).any() for m in matrices):
            return None
        flat = first.reshape(-1)
        classes, places = np.unique(flat, return_index=True)
        place = {int(c): int(i) for c, i in zip(classes, places, strict=True) if c >= 0}
        if len(place) == 1:
            return None
        of = np.full(max(place) + 2, FREE, np.int32)
        of[list(place)] = list(place.values())

        def numbered(channels: Channels) -> Channels:
            return of[np.where(channels < len(of), channels, FREE)]

        own = self.book.sizes(flat)
        count = None
        if own.size and (own == own[0]).all() and own[0] >= 0 and first.ndim == 1:
            lead = group[0][0]
            assert lead.stored is not None and lead.experts is not None
            count = lead.stored.shape[lead.experts]

        def spread(end: _End, channels: Channels) -> Channels:
            channels = numbered(channels)
            if count is None or end.experts is None:
                return channels
            steps = np.arange(count, dtype=np.int32) * np.int32(flat.size)
            shape = [1] * channels.ndim
            shape[end.experts] = count
            return np.where(channels >= 0, channels + steps.reshape(shape), np.int32(FREE))

        whole = numbered(first)
        if count is not None:
            steps = np.arange(count, dtype=np.int32)[:, None] * np.int32(flat.size)
            whole = np.where(whole >= 0, whole + steps, np.int32(FREE))
        sources = [(end, spread(end, channels)) for end, channels in ends]
        identity = (whole == np.arange(whole.size, dtype=np.int32).reshape(whole.shape)).all()
        return Fold(
            sites=tuple(
                SiteRef(site=end.site, root=end.root, channels=spread(end, channels))
                for end, channels in group
            ),
            sources=tuple(
                Source(root=end.root, channels=channels)
                for end, channels in sources
                if any_in(channels)
            ),
            shape=tuple(whole.shape),
            channels=None if identity else whole,
        )


def _live(graph: Graph) -> list[Step]:
    """The steps that the outputs need. Others are left over where a slice of a stack took over."""
    needed: set[int] = {x for x in graph.outputs if isinstance(x, Value)}
    steps: list[Step] = []
    for step in reversed(graph.steps):
        if not needed.isdisjoint(step.outputs):
            needed.update(step.reads)
            steps.append(step)
    return steps[::-1]


def _reads_weight(step: Step, root: Root) -> bool:
    """Whether a step is a site of this parameter and of no other."""
    mark = step.mark
    return mark is not None and mark.root == root and not mark.others and mark.use.roles is not None


def _columns(
    book: Book, step: Step, use: Any, read: list[Channels], shapes: list[tuple[int, ...]]
) -> tuple[int, Channels] | None:
    """Which operand a weight is multiplied with, and its channels in the weight's present axes.

    `None` where they cannot be taken up.
    """
    params, side = step.eqn.params, use.side
    other = 1 - side
    if use.op == "dot":
        contracted, batch = params["dimension_numbers"]
        theirs, ours = ((*contracted[s], *batch[s]) for s in (other, side))
    elif use.op == "ragged_dot":
        axes = ragged_axes(step.eqn)
        assert not isinstance(axes, str)
        theirs, ours = (axes[0][1],), (axes[1][1],)
    elif use.op == "conv" and params["feature_group_count"] == params["batch_group_count"] == 1:
        numbers = params["dimension_numbers"]
        theirs, ours = (numbers.lhs_spec[1],), (numbers.rhs_spec[1],)
    else:
        return None
    channels = read[other]
    free_axes = tuple(a for a in range(channels.ndim) if a not in theirs)
    channels = fixed_along(book, channels, free_axes)
    present = np.full((1,) * len(shapes[side]), FREE, np.int32)
    sizes = [1] * present.ndim
    for a, b in zip(theirs, ours, strict=True):
        sizes[b] = channels.shape[a]
    order = sorted(range(len(theirs)), key=lambda i: ours[i])
    moved = channels.transpose([*(theirs[i] for i in order), *free_axes])
    return other, moved.reshape(sizes)


def _rows(
    book: Book, step: Step, use: Any, present: Channels, shapes: list[tuple[int, ...]], ndim: int
) -> Channels:
    """The channels of a site's result, from those of its weight's present axes."""
    params = step.eqn.params
    if use.op == "dot":
        other = len(shapes[1 - use.side])
        return product_of_axes(book, present, other, params["dimension_numbers"], use.side)
    if use.op == "take":
        return gathered(book, step.eqn, present, shapes[0])
    sizes = [1] * ndim
    if use.op == "conv":
        numbers = params["dimension_numbers"]
        place, kept = numbers.out_spec[1], numbers.rhs_spec[0]
    else:
        axes = ragged_axes(step.eqn)
        assert not isinstance(axes, str)
        place, kept = 1, axes[1][2]
    sizes[place] = present.shape[kept]
    return present.reshape(sizes)
