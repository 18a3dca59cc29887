"""What will happen at one site, and what the sites of one parameter must agree on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..ops import Outliers, OutlierWeights
from ..qarray import Scheme
from ..training import LoRA, Training
from ._rules import Algorithm, Rule, Scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class SitePlan:
    """What will happen at one site.

    `shape` and `dtype` are those of the stored parameter, `roles` what each of its axes is to the
    op. `reason` says why the weight is left as it is; `None` means that it is quantized.

    A product of two activations (`op` is `product`) has no weight: `path` is the module's, `shape`
    the result's, and both sides are rounded as `activations` says.

    `algorithm`, `scaling`, `static` and `outliers` are those of the rule, where they mean something
    at the site.
    """

    site: str
    path: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    roles: tuple[str, ...] | None
    weights: Scheme | None
    activations: Scheme | None
    rule: str | None
    reason: str | None
    algorithm: Algorithm | None = None
    scaling: Scaling | None = None
    static: bool = False
    outliers: Outliers | None = None
    training: Training | None = None
    adapter: LoRA | None = None

    @property
    def needs_calibration(self) -> bool:
        """Whether data decide how it is quantized."""
        informed = self.algorithm is not None and len(self.algorithm.observers) > 0
        apart = self.outliers is not None and self.outliers.weights is OutlierWeights.ORIGINAL
        return informed or apart or self.static or self.scaling is not None

    @property
    def facts(self) -> str:
        """What decides the numbers; what is not set is left out, so that old digests hold."""
        always = (self.site, self.op, self.roles, self.weights, self.activations)
        beside = {name: getattr(self, name) for name in ADDED}
        beside = {name: x for name, x in beside.items() if x is not None and x is not False}
        return repr(always) + (repr(beside) if beside else "")


ADDED = ("algorithm", "scaling", "static", "outliers", "training", "adapter")
"""Fields of a site that only some have."""


def added(rule: Rule, op: str) -> dict[str, Any]:
    """What the rule says beside its schemes. A lookup has no inputs that it could speak of."""
    if op != "take":
        return {name: getattr(rule, name) for name in ADDED}
    free = rule.algorithm is not None and not rule.algorithm.observers
    return {"algorithm": rule.algorithm if free else None, "training": rule.training}


def unfit(site: SitePlan) -> list[str]:
    """What the rule of a site asks for that its op cannot do."""
    problems = []
    if site.outliers is not None and site.op != "dot":
        problems.append(
            f"{site.site} is no dot, and only dots keep outliers apart; give it a rule of its own"
        )
    if site.adapter is not None and site.op != "dot":
        problems.append(
            f"{site.site} is no dot, and only dots have adapters; give it a rule of its own"
        )
    back = None if site.training is None else site.training.way_back
    if site.weights is not None and back is not None and site.op != "dot":
        problems.append(
            f"{site.site} is a {site.op}, and only dots have their products of the way back on "
            "codes; leave it, or give it a rule of its own"
        )
    if site.op == "ragged_dot" and site.static:
        problems.append(
            f"{site.site} deals its inputs out to experts, and static scales of each expert's are "
            "not computed with; give it a rule that is not static"
        )
    informed = site.algorithm is not None and len(site.algorithm.observers) > 0
    if site.op == "conv" and (informed or site.scaling is not None):
        problems.append(
            f"{site.site} is a convolution, for which data decide static ranges and nothing else; "
            "give it an algorithm that needs no data, and no scaling"
        )
    return problems


def clashes(path: str, sites: Sequence[SitePlan], elsewhere: str) -> list[str]:
    """What the sites of one parameter must agree on beside how it is held.

    Sites that are left read what the codes stand for.
    """
    found = []
    first = sites[0]
    for site in sites[1:]:
        if site.scaling != first.scaling:
            found.append(
                f"{first.site} and {site.site} read {path} with the scalings {first.scaling} and "
                f"{site.scaling}, and it is multiplied once; give both the same one, or none"
            )
    informed = [s for s in sites if s.weights and (s.op != "take" or s.algorithm is not None)]
    for site in informed[1:]:
        if site.algorithm != informed[0].algorithm:
            found.append(
                f"{informed[0].site} and {site.site} would choose the codes of {path} by "
                f"{informed[0].algorithm} and {site.algorithm}; give both the same algorithm"
            )
    trained = [s for s in sites if s.weights and s.training is not None]
    for site in trained[1:]:
        one, other = (s.training and s.training.weights for s in (trained[0], site))
        if one != other:
            found.append(
                f"{trained[0].site} and {site.site} would round {path} in training by {one} and "
                f"{other}; give both the same estimator"
            )
    if first.scaling is not None and elsewhere == "dequantize":
        found.append(
            f"{path} is scaled for {first.site}, and elsewhere='dequantize' would let others read "
            "it scaled; leave out one of the two"
        )
    return found
