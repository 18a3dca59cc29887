"""Plans: a recipe applied to a model. Every site, what will happen to it, and why. Data."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from ..qarray import abstract_qarray, bytes_held, QArray, Scheme, tile_shape
from ._rules import Algorithm, Recipe
from ._site_plan import added, clashes, SitePlan, unfit
from ._weight import BATCH, CLOSED_OVER, CONTRACTED, STACK


class PlanError(ValueError):
    """A recipe does not fit a model: a rule matches nothing, or a site is left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafPlan:
    """How one parameter will be held.

    `contracted` are the axes that its op sums over, `stack` those that hold several weights side by
    side; the others are kept.

    `spec` names the mesh axes that shard each of its axes, joined by commas, where that is known;
    on the axes in `replicated` tile boundaries do not fall on shard boundaries, so that each device
    holds all scales. Neither changes what is computed, nor the fingerprint.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    scheme: Scheme
    contracted: tuple[int, ...]
    stack: tuple[int, ...]
    elsewhere: str
    spec: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    replicated: tuple[int, ...] = dataclasses.field(default=(), repr=False)

    @functools.cached_property
    def abstract(self) -> QArray:
        """The shapes of what will be held."""
        return abstract_qarray(
            self.shape,
            np.dtype(self.dtype),
            self.scheme,
            contracted=self.contracted,
            stack=self.stack,
        )

    @property
    def tile(self) -> tuple[int, ...]:
        """The tile of each axis; the last one along an axis may be shorter."""
        return self.abstract.tile

    @property
    def matrix(self) -> tuple[tuple[int, ...], int, int]:
        """As a stack of matrices: the sizes of its stack axes, its inputs and its outputs."""
        stack = tuple(self.shape[a] for a in self.stack)
        k = math.prod(self.shape[a] for a in self.contracted)
        return stack, k, math.prod(self.shape) // max(1, k * math.prod(stack))

    @property
    def bytes_before(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def bytes_after(self) -> int:
        return bytes_held(self.abstract)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Every site of a model and what will happen to it. `print` it. Equal if they do the same.

    `others` are parameters that no site reads, by path, with the operations that do read them;
    `sizes` are the bytes of every parameter, `counts` its values. `mesh` is the one that parameters
    lie on, where known; `backends` says of each product, as it was planned, by what it is computed
    on the device in force, and why not by that device's first choice. Neither is part of what a
    plan does: checkpoints do not carry them.
    """

    recipe: str
    sites: tuple[SitePlan, ...]
    leaves: tuple[LeafPlan, ...]
    others: tuple[tuple[str, str], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    mesh: AbstractMesh | None = None
    backends: tuple[tuple[str, str, str | None], ...] = ()

    @functools.cached_property
    def by_site(self) -> dict[str, SitePlan]:
        return {site.site: site for site in self.sites}

    @functools.cached_property
    def by_path(self) -> dict[str, LeafPlan]:
        return {leaf.path: leaf for leaf in self.leaves}

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that two plans share only if they do the same."""
        facts = [site.facts for site in self.sites]
        facts += [repr(leaf) for leaf in self.leaves]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @functools.cached_property
    def needs_calibration(self) -> tuple[str, ...]:
        """The sites that cannot be quantized without data."""
        return tuple(site.site for site in self.sites if site.needs_calibration)

    @functools.cached_property
    def algorithms(self) -> dict[str, Algorithm]:
        """The algorithms that choose codes, by the path of the parameter; others are rounded."""
        by_path = {s.path: s.algorithm for s in self.sites if s.weights is not None}
        by_path |= {s.path: s.algorithm for s in self.sites if s.algorithm is not None}
        return {path: found for path, found in by_path.items() if found is not None}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def parameters(self) -> int:
        """Values of all parameters."""
        return sum(count for _, count in self.counts)

    @property
    def bytes_before(self) -> int:
        return sum(size for _, size in self.sizes)

    @property
    def bytes_after(self) -> int:
        saved = sum(leaf.bytes_before - leaf.bytes_after for leaf in self.leaves)
        return self.bytes_before - saved

    def __str__(self) -> str:
        from ._account import Account

        return str(Account(plan=self))


def make_plan(
    recipe: Recipe,
    uses: list[Any],
    others: dict[str, set[str]],
    avals: dict[str, Any],
    products: Sequence[SitePlan] = (),
) -> Plan:
    """Applies the rules to the uses that a trace met, and checks that nothing is left by accident.

    `products` are planned already.

    **Raises:** `PlanError` listing every rule that matches nothing, and every site that no rule
    matches or that cannot be quantized though a rule says so.
    """
    sites = [_site_plan(recipe, use, avals) for use in uses]
    own = [site for site in sites if not site.path.startswith(CLOSED_OVER)]
    problems = [
        f"the rule {rule.match!r} matches nothing"
        for rule in recipe.rules
        if not rule.optional
        and not any(rule.matches(s.path, s.site) for s in own)
        and not any(rule.matches(s.path, s.site, product=True) for s in products)
    ]
    wanted = {s.site: recipe.rule_for(s.path, s.site) for s in sites}
    for site in own:
        rule = wanted[site.site]
        if rule is None:
            problems.append(f"no rule matches {site.site}; add one, with or without weights")
        elif rule.weights is not None and site.reason is not None:
            problems.append(f"{site.site} cannot be quantized: {site.reason}; leave it by a rule")
        else:
            problems += unfit(site)
    leaves, differing = _leaves(sites, wanted)
    problems += differing
    for leaf in leaves:
        if leaf.elsewhere == "error" and others.get(leaf.path):
            ops = "; ".join(sorted(others[leaf.path]))
            problems.append(
                f"{leaf.path} is quantized, but also needed as an array by: {ops}; "
                "say elsewhere='dequantize' in its rule, or leave it"
            )
    if problems:
        known = ", ".join(s.site for s in sites[:6]) + (", ..." if len(sites) > 6 else "")
        listed = "\n  - ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise PlanError(
            f"The recipe {recipe.name!r} does not fit this model:\n  - {listed}{more}\n"
            f"The model has {len(sites) + len(products)} sites: {known}"
        )
    read = {site.path for site in sites}
    sites += products
    return Plan(
        recipe=recipe.name,
        sites=tuple(sites),
        leaves=tuple(leaves),
        others=tuple(
            (path, ", ".join(sorted(others.get(path, ()))) or "nothing")
            for path in avals
            if path not in read
        ),
        sizes=tuple((path, bytes_held(aval)) for path, aval in avals.items()),
        counts=tuple((path, math.prod(aval.shape)) for path, aval in avals.items()),
    )


def _site_plan(recipe: Recipe, use: Any, avals: dict[str, Any]) -> SitePlan:
    aval = avals.get(use.path)
    reason, weights, activations = use.reason, None, None
    rule = recipe.rule_for(use.path, use.site)
    if aval is None:
        aval = use.weight.value
        reason = "closed over: not among the model's variables"
    elif rule is not None and rule.weights is None:
        reason = reason or f"left by the rule {rule.match!r}"
    elif rule is not None and rule.weights is not None and reason is None:
        weights = rule.weights
        # A lookup multiplies nothing: there is no activation to round.
        activations = rule.activations if use.op != "take" else None
        try:
            contracted, stack = role_axes(use.roles)
            tile_shape(tuple(aval.shape), weights.tile, contracted=contracted, stack=stack)
        except ValueError as error:
            reason, weights, activations = str(error), None, None
    beside = {} if rule is None or weights is None else added(rule, use.op)
    return SitePlan(
        site=use.site,
        path=use.path,
        op=use.op,
        shape=tuple(aval.shape),
        dtype=str(np.dtype(aval.dtype)),
        roles=use.roles,
        weights=weights,
        activations=activations,
        rule=None if rule is None else rule.match,
        reason=reason,
        **beside,
    )


def role_axes(roles: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The stored axes that are contracted, and those that hold weights side by side."""
    contracted = tuple(i for i, role in enumerate(roles) if role == CONTRACTED)
    return contracted, tuple(i for i, role in enumerate(roles) if role in (STACK, BATCH))


def _shapes(leaf: LeafPlan) -> Any:
    """What two uses of a parameter must agree on, beside the scheme."""
    return [part.shape for part in jax.tree.leaves(leaf.abstract)]


def _leaves(sites: list[SitePlan], wanted: dict[str, Any]) -> tuple[list[LeafPlan], list[str]]:
    """One plan for each parameter that a site quantizes; its sites have to agree."""
    leaves: dict[str, LeafPlan] = {}
    found: list[str] = []
    for site in sites:
        if site.weights is None or site.roles is None:
            continue
        contracted, stack = role_axes(site.roles)
        leaf = LeafPlan(
            path=site.path,
            shape=site.shape,
            dtype=site.dtype,
            scheme=site.weights,
            contracted=contracted,
            stack=stack,
            elsewhere=wanted[site.site].elsewhere,
        )
        first = leaves.setdefault(site.path, leaf)
        if first.scheme != leaf.scheme or _shapes(first) != _shapes(leaf):
            found.append(
                f"{site.site} would hold {site.path} as {leaf.scheme} with tiles {leaf.tile}, but "
                f"another use holds it as {first.scheme} with tiles {first.tile}; leave one of "
                "the uses by a rule of its own (it then reads the dequantized weight)"
            )
    for path, leaf in leaves.items():
        found += clashes(path, [site for site in sites if site.path == path], leaf.elsewhere)
    return list(leaves.values()), found
