"""Evaluating a jaxpr with weights in its environment.

The walk is one and the same for every mode; a mode is what is done where a site is met. It follows
JAX's documented way of writing interpreters ("Writing custom Jaxpr interpreters").
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.extend import core, source_info_util

from ..qarray import QArray
from ._dependence import Dependence, JOINS, NOTHING
from ._explicit import explicit_sharding
from ._joined import follow, join, plain, product, Sliced, splits
from ._products import enclosing_names, product_path
from ._roles import site_roles
from ._views import barrier, device_put, SPLITS, VIEWS
from ._weight import CLOSED_OVER, is_weight, Joined, Position, Weight, whole

# Operations that read a weight the way a linear layer does. One that is not computed on codes (see
# `_roles`) is a site all the same: the plan has to say that it was left out, and why.
SITE_OPS = {
    "dot_general": "dot",
    "gather": "take",
    "conv_general_dilated": "conv",
    "ragged_dot_general": "ragged_dot",
}


# What has no fixed sequence of equations, or runs elsewhere: it stays one equation of a flat graph.
UNFLATTENED = ("while", "cond", "shard_map")

MOVES = {"optimization_barrier": barrier, "device_put": device_put}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Use:
    """One equation reading one weight.

    `operands` are what it reads, each as it was before a `shard_map` said that it may vary. `memo`
    keeps what was found out about values of the same scope.
    """

    site: str
    path: str
    op: str
    side: int
    weight: Weight
    roles: tuple[str, ...] | None
    reason: str | None
    eqn: Any
    operands: tuple[Any, ...]
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)


@runtime_checkable
class Mode(Protocol):
    """What is done at a site. One that `flattens` evaluates bodies in line, loops step by step.

    To one that `reads_stacks`, loops over stacked weights tell where each step's weights lie. In
    one that `trains`, weights have gradients.
    """

    tracks_constants: bool
    collects: bool
    products: bool
    flattens: bool
    reads_stacks: bool
    trains: bool

    def compute(self, uses: Sequence[Use], operands: Sequence[Any], eqn: Any) -> tuple[Any, Any]:
        """The result of the equation, and statistics by site (or an empty dict)."""
        ...

    def product(self, site: str, path: str, operands: Sequence[Any], eqn: Any) -> Any:
        """The result of a product of two activations; asked only where `products` holds."""
        ...

    def leave(self, weight: Weight, eqn: Any, reason: str | None) -> Any:
        """The plain array for a weight that an equation reads otherwise; may raise."""
        ...

    def merge(self, site: str, a: Any, b: Any) -> Any: ...

    def empty(self, site: str, struct: Any) -> Any: ...

    def reduce(self, site: str, value: Any) -> Any:
        """Statistics of all devices, inside a `shard_map`."""
        ...

    def for_derivatives(self) -> "Mode":
        """The mode in which a user's derivative rules are evaluated."""
        ...


class Evaluator:
    """Evaluates jaxprs whose inputs may be `Weight`s, in one mode.

    `dependence` says where weights may be put together, and where activations meet.
    """

    def __init__(self, mode: Mode, dependence: Dependence = NOTHING):
        self.mode = mode
        self.dependence = dependence
        self._names: tuple[str, ...] = ()
        self.stats: dict[str, Any] = {}
        self._memo: dict[Any, Any] = {}
        self.scans: dict[str, tuple[Position, ...]] = {}
        self._numbers: dict[str, dict[Position, int]] = {}
        self._constants: dict[int, Any] = {}
        self._spread: dict[int, tuple[Any, Any]] = {}

    def site_id(self, path: str, use: str, position: Position) -> str:
        """`path#use`, then `path#use.1` and so on, in the order of first visits.

        A body that JAX traces twice is visited at the same positions, so ids do not shift.
        """
        seen = self._numbers.setdefault(f"{path}#{use}", {})
        number = seen.setdefault(position, len(seen))
        return f"{path}#{use}" + (f".{number}" if number else "")

    @contextlib.contextmanager
    def collecting(self) -> Iterator[dict[str, Any]]:
        """Statistics of what is evaluated inside, kept apart from those outside."""
        outer, memo = self.stats, self._memo
        self.stats, self._memo = {}, {}
        try:
            yield self.stats
        finally:
            self.stats, self._memo = outer, memo

    def add(self, stats: dict[str, Any]) -> None:
        """Adds statistics by site to those of the present level."""
        for site, value in stats.items():
            have = self.stats.get(site)
            self.stats[site] = value if have is None else self.mode.merge(site, have, value)

    def scoped(
        self, jaxpr: Any, args: Sequence[Any], position: Position
    ) -> tuple[list[Any], dict[str, Any]]:
        """Outputs of a body, and its statistics, kept apart."""
        with self.collecting() as stats:
            outs = self.closed(jaxpr, args, position)
        return outs, stats

    def closed(self, jaxpr: Any, args: Sequence[Any], position: Position) -> list[Any]:
        """Evaluates a jaxpr with its own constants: a `ClosedJaxpr`, or a `Jaxpr` that has none."""
        consts = getattr(jaxpr, "consts", ())
        opened = getattr(jaxpr, "jaxpr", jaxpr)
        if self.mode.tracks_constants:
            consts = [self._constant(c, (*position, i)) for i, c in enumerate(consts)]
        return self.evaluate(opened, consts, args, position)

    def _constant(self, value: Any, position: Position) -> Any:
        if getattr(value, "ndim", 0) < 2 or not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        return whole(value, f"{CLOSED_OVER} {'.'.join(map(str, position))}>")

    def evaluate(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], position: Position
    ) -> list[Any]:
        """The outputs of `jaxpr`; weights that pass through unread come out as weights."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        last = _last_uses(jaxpr)

        def read(atom: Any) -> Any:
            if isinstance(atom, core.Literal):
                return atom.val
            return env[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            operands = [read(atom) for atom in eqn.invars]
            outs = self.equation(eqn, operands, (*position, i))
            for var, out in zip(eqn.outvars, outs, strict=True):
                if not isinstance(var, core.Literal):
                    env[var] = out
            for var in last[i]:
                # As soon as nothing reads a value any more its memory may go.
                env.pop(var, None)
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
        """One equation, under the name stack and source line of the user's code."""
        names = source_info_util.current_name_stack() + eqn.source_info.name_stack
        context = source_info_util.user_context(eqn.source_info.traceback, name_stack=names)
        with context, eqn.ctx.manager, self._inside(eqn):
            if any(map(is_weight, operands)):
                return self.weighted(eqn, operands, position)
            if self.mode.products and position in self.dependence.products:
                path = product_path(self._names)
                site = self.site_id(path, "product", position)
                return [self.mode.product(site, path, operands, eqn)]
            if self.mode.products and position in self.dependence.around:
                return self.weighted(eqn, operands, position)
            return self.bind(eqn, operands)

    @contextlib.contextmanager
    def _inside(self, eqn: Any) -> Iterator[None]:
        """Keeps the names of the modules around an equation, the body's and those outside."""
        outer, self._names = self._names, (*self._names, *enclosing_names(eqn))
        try:
            yield
        finally:
            self._names = outer

    def bind(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """The equation as it is."""
        params = eqn.primitive.get_bind_params(eqn.params)
        out = eqn.primitive.bind(*operands, **params)
        outs = list(out) if eqn.primitive.multiple_results else [out]
        if self.mode.tracks_constants and all(map(self._depends_on_nothing, operands)):
            self._constants.update((id(x), x) for x in outs)
        if eqn.primitive.name == "pvary":
            # The values are the same as before: what is counted should be counted once.
            self._spread.update((id(out), (out, x)) for out, x in zip(outs, operands, strict=True))
        return outs

    def _depends_on_nothing(self, value: Any) -> bool:
        """Whether a value, such as a mask, is the same whatever the arguments are."""
        return not isinstance(value, Tracer) or id(value) in self._constants

    def weighted(self, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
        """An equation that reads at least one weight, or holds one that is to be listed."""
        from ._higher_order import RULES

        name = eqn.primitive.name
        if name in RULES and not (self.mode.flattens and name in UNFLATTENED):
            return RULES[name](self, eqn, operands, position)
        if name in SITE_OPS:
            return self.site(eqn, operands, position)
        if name in MOVES:
            return MOVES[name](eqn, operands)
        try:
            seen = self.seen(eqn, operands, position)
        except ValueError as error:
            # The QArray says why its tiles would break; the mode decides what then.
            return self.opaque(eqn, operands, str(error))
        return self.opaque(eqn, operands, None) if seen is None else seen

    def seen(self, eqn: Any, operands: list[Any], position: Position) -> list[Any] | None:
        """The weights as views or joins of others; `None` where the equation is neither.

        **Raises:** `ValueError` where tiles would be cut.
        """
        name, (first, *rest) = eqn.primitive.name, operands
        if name in JOINS and position in self.dependence.joins:
            if any(is_weight(x) and getattr(x, "via", None) is None for x in operands):
                return [join(eqn, operands)]
        if not is_weight(first) or any(map(is_weight, rest)):
            return None
        if isinstance(first, Joined):
            if name in SPLITS:
                return splits(eqn, first)
            view = follow(eqn, first, *rest) if name in VIEWS else None
        elif first.via is not None:
            return None
        elif name in SPLITS:
            return SPLITS[name](eqn, first)
        else:
            view = VIEWS[name](eqn, first, *rest) if name in VIEWS else None
        return None if view is None else [view]

    def leave(self, x: Any, eqn: Any, reason: str | None) -> Any:
        """The plain array for a weight, or for several put together."""
        if not isinstance(x, Joined):
            return self.mode.leave(x, eqn, reason) if is_weight(x) else x
        return lax.concatenate([self.leave(part, eqn, reason) for part in x.parts], x.axis)

    def opaque(self, eqn: Any, operands: list[Any], reason: str | None) -> list[Any]:
        """An equation that is neither a view nor a site: weights go in as plain arrays."""
        weights = [x for x in operands if is_weight(x)]
        inner = [] if reason else list(core.jaxprs_in_params(eqn.params))
        if inner:
            reason = f"{eqn.primitive.name} cannot be entered"
        outs = self.bind(eqn, [self.leave(x, eqn, reason) for x in operands])
        if not self.mode.tracks_constants:
            return outs
        if not all(is_weight(x) or self._depends_on_nothing(x) for x in operands):
            return outs
        # A function of parameters alone is still the parameter's business: a product that reads it
        # is a site which cannot be quantized in place, and the plan will say so.
        source = weights[0].weights[0] if isinstance(weights[0], Joined) else weights[0]
        via = source.via or eqn.primitive.name
        return [
            dataclasses.replace(source.view(out, ((),) * len(out.shape)), via=via)
            if hasattr(out, "shape")
            else out
            for out in outs
        ]

    def array(self, value: Any, eqn: Any) -> Any:
        """A result that leaves the body of `eqn`, where only arrays can go."""
        if not is_weight(value):
            return value
        return self.leave(value, eqn, f"{eqn.primitive.name} returns it")

    def _shared(self, x: Any) -> Any:
        """What an operand was before a `shard_map` said that it may vary."""
        if isinstance(x, Sliced):
            return dataclasses.replace(x, whole=self._shared(x.whole))
        return self._spread.get(id(x), (x, x))[1]

    def site(self, eqn: Any, operands: list[Any], position: Position) -> list[Any]:
        """An equation that multiplies with, or looks up in, a weight."""
        if any(isinstance(x, Joined) for x in operands):
            return product(self, eqn, operands, position)
        op = SITE_OPS[eqn.primitive.name]
        shared = tuple(map(self._shared, operands))
        uses = []
        for side, operand in enumerate(operands):
            if not is_weight(operand):
                continue
            found = site_roles(operand, eqn, op, side)
            given, reason = (None, found) if isinstance(found, str) else (found, None)
            uses.append(
                Use(
                    site=self.site_id(operand.path, op, (*position, side)),
                    path=operand.path,
                    op=op,
                    side=side,
                    weight=operand,
                    roles=given,
                    reason=reason,
                    eqn=eqn,
                    operands=shared,
                    memo=self._memo,
                )
            )
        out, stats = self.mode.compute(uses, operands, eqn)
        for use in uses:
            self.scans[use.site] = use.weight.scans
        self.add(stats)
        return [out]


def _last_uses(jaxpr: Any) -> list[list[Any]]:
    """For each equation, the variables that nothing reads after it."""
    last: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for atom in eqn.invars:
            if not isinstance(atom, core.Literal):
                last[atom] = i
    for atom in jaxpr.outvars:
        if not isinstance(atom, core.Literal):
            last.pop(atom, None)
    result: list[list[Any]] = [[] for _ in jaxpr.eqns]
    for var, i in last.items():
        result[i].append(var)
    return result


def shape_of(value: Any) -> Any:
    """Shape and dtype of an array, for tracing in its place."""
    leaf = jax.tree.leaves(value)[0] if is_weight(value) or isinstance(value, QArray) else value
    if isinstance(leaf, Tracer) and jax.typeof(leaf).manual_axis_type.varying:
        # Inside a `shard_map` only an array can say what varies. Nobody reads its values.
        return plain(value)
    sharding = explicit_sharding(value) if isinstance(value, QArray) else None
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
