"""Mode *mark*: the model written out as one list of equations, with its sites recognizable.

What it evaluates is traced once more. In that jaxpr each equation that reads a weight as a site is
a `site` primitive, and each slice of a stacked weight that a step of an unrolled scan gets is a
`root` primitive: an input that has no equation behind it. `_graph` reads both.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive

from ._evaluate import Use
from ._joined import plain
from ._plan import PlanError
from ._weight import is_weight, Joined, Position, Weight

site_p = Primitive("jaxquant_site")
root_p = Primitive("jaxquant_root")


@site_p.def_abstract_eval
def _site_aval(*operands: Any, mark: int, shape: tuple[int, ...], dtype: Any) -> Any:
    return ShapedArray(shape, dtype)


@root_p.def_abstract_eval
def _root_aval(*, root: "Root", shape: tuple[int, ...], dtype: Any) -> Any:
    return ShapedArray(shape, dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Root:
    """A parameter, or the slice of a stacked one: `steps` are pairs of stored axis and index."""

    path: str
    steps: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        at = ",".join(str(index) for _, index in self.steps)
        return f"{self.path}[{at}]" if at else self.path


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MarkedSite:
    """One equation that reads a weight, once for each step of the loops around it.

    `use` is as in other modes, its values tracers of a trace that is over: only its static facts
    hold. `others` are further uses, where both sides of a product are weights.
    """

    use: Use
    root: Root
    eqn: Any
    others: tuple[Use, ...] = ()

    @property
    def site(self) -> str:
        return self.use.site


class Mark:
    """Binds `site` and `root` in place of what it meets; computes nothing."""

    tracks_constants = False
    collects = False
    products = False
    flattens = True
    trains = False
    reads_stacks = False

    def __init__(self) -> None:
        self.marks: list[MarkedSite] = []
        self.unreached: dict[str, str] = {}
        self._steps: dict[Position, int] = {}
        self._axes: dict[tuple[str, Position], int] = {}

    def step(self, x: Any, index: int, position: Position) -> Any:
        """What step `index` of the scan at `position` sees of `x`."""
        self._steps[position] = index
        if isinstance(x, Joined):
            parts = tuple(self.step(part, index, position) for part in x.parts)
            return Joined(parts=parts, axis=x.axis - 1)
        if not is_weight(x):
            return lax.index_in_dim(x, index, 0, keepdims=False)
        scans = (*x.scans, position)
        if x.via is not None:
            value = lax.index_in_dim(x.value, index, 0, keepdims=False)
        else:
            value = self._slice(x, index, position)
        return dataclasses.replace(x.view(value, x.axes[1:]), scans=scans)

    def _slice(self, weight: Weight, index: int, position: Position) -> Any:
        """Slice `index` of the first axis of a stacked weight: a root, seen as the weight is.

        **Raises:** `PlanError` where the loop steps through something else than a stored axis.
        """
        (first, *axes), shape = weight.axes, weight.shape[1:]
        steps = self._root(weight).steps
        present = sorted(a for group in axes for a in group)
        whole = [weight.stored[a] for a in first] == [weight.shape[0]] and all(
            math.prod(weight.stored[a] for a in group) == size
            for group, size in zip(axes, shape, strict=True)
        )
        if not whole or sorted([*dict(steps), *first, *present]) != [*range(len(weight.stored))]:
            raise PlanError(
                f"A scan steps through a part of {weight.path} that is no slice of it as it is "
                "stored. Calibrate the model with its layers outside of the scan, or leave this "
                "parameter by a rule."
            )
        self._axes[weight.path, position] = first[0]
        root = Root(path=weight.path, steps=tuple(sorted([*steps, (first[0], index)])))
        stored = tuple(weight.stored[a] for a in present)
        value = root_p.bind(root=root, shape=stored, dtype=weight.dtype)
        order = [present.index(a) for group in axes for a in group]
        return jnp.transpose(value, order).reshape(shape)

    def _root(self, weight: Weight) -> Root:
        """Which slice of its parameter a weight is, by the steps of the loops around it."""
        steps = [(self._axes[weight.path, scan], self._steps[scan]) for scan in weight.scans]
        return Root(path=weight.path, steps=tuple(sorted(steps)))

    def compute(self, uses: Sequence[Use], operands: Sequence[Any], eqn: Any) -> tuple[Any, Any]:
        first, *rest = uses
        self.marks.append(
            MarkedSite(use=first, root=self._root(first.weight), eqn=eqn, others=tuple(rest))
        )
        mark = len(self.marks) - 1
        values = list(map(plain, operands))
        # Not the equation's own result: of weights that were put together each is a site.
        out = jax.eval_shape(lambda *xs: eqn.primitive.bind(*xs, **eqn.params), *values)
        return site_p.bind(*values, mark=mark, shape=out.shape, dtype=out.dtype), {}

    def product(self, site: str, path: str, operands: Sequence[Any], eqn: Any) -> Any:
        raise AssertionError("products of activations are not marked")

    def leave(self, weight: Weight, eqn: Any, reason: str | None) -> Any:
        if reason is not None:
            self.unreached.setdefault(weight.path, reason)
        return plain(weight)

    def merge(self, site: str, a: Any, b: Any) -> Any:
        return a

    def empty(self, site: str, struct: Any) -> Any:
        return struct

    def reduce(self, site: str, value: Any) -> Any:
        return value

    def for_derivatives(self) -> "Mark":
        return self
