"""The account of a plan: what each site costs, how well it is held, and why it is as it is."""

import dataclasses
import functools
import math

import numpy as np

from ..ops import Outliers
from ..qarray import Scheme, WeightError
from ..training import LoRA, Training
from ._plan import Plan, SitePlan
from ._rules import Algorithm, Scaling
from ._site_plan import ADDED


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteAccount:
    """One site. `reason` says why its weight is left as it is; `None` means quantized.

    `bits_per_value` are those of the weight as it is held, scales and zero points included; `rule`
    is the pattern that decided. `error` is `None` for a weight that is left or was not measured.
    """

    site: str
    path: str
    shape: tuple[int, ...]
    weights: Scheme | None
    activations: Scheme | None
    bits_per_value: float
    rule: str | None
    reason: str | None
    error: WeightError | None
    algorithm: Algorithm | None = None
    scaling: Scaling | None = None
    static: bool = False
    outliers: Outliers | None = None
    training: Training | None = None
    adapter: LoRA | None = None

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise of the weight in decibels, where there is noise."""
        return None if self.error is None else self.error.sqnr_db


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """A plan, and the errors that its weights were measured to have. `print` it.

    `errors` are by path, in the order of the plan's leaves; before quantizing there are none.
    `notes` are what calibration did beside choosing codes: what factors were folded into, inputs
    that could not be scaled, sites where something did not go as usual.

    ```python
    qvariables, account = jq.quantize(variables, plan, account=True)
    print(account)
    worst = min(account.sites, key=lambda site: site.sqnr_db or 1e9)
    ```
    """

    plan: Plan
    errors: tuple[tuple[str, WeightError], ...] = ()
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def by_path(self) -> dict[str, WeightError]:
        """The errors by path."""
        return dict(self.errors)

    @functools.cached_property
    def sites(self) -> tuple[SiteAccount, ...]:
        """Every site, in the order of the plan. A weight with two sites is told of twice."""
        held = {
            leaf.path: 8 * leaf.bytes_after / max(math.prod(leaf.shape), 1)
            for leaf in self.plan.leaves
        }
        return tuple(self._site(site, held) for site in self.plan.sites)

    def _site(self, site: SitePlan, held: dict[str, float]) -> SiteAccount:
        bits = held.get(site.path, 8.0 * np.dtype(site.dtype).itemsize)
        if site.weights is None and site.activations is not None:
            # A product of two activations, which live for a moment only: their codes.
            bits = float(site.activations.values.bits)
        return SiteAccount(
            site=site.site,
            path=site.path,
            shape=site.shape,
            weights=site.weights,
            activations=site.activations,
            bits_per_value=bits,
            rule=site.rule,
            reason=site.reason,
            error=self.by_path.get(site.path),
            **{name: getattr(site, name) for name in ADDED},
        )

    @property
    def quantized(self) -> int:
        """How many sites read a weight that is quantized for them."""
        return sum(site.reason is None for site in self.plan.sites)

    @property
    def left(self) -> int:
        """How many sites are left as they are."""
        return len(self.plan.sites) - self.quantized

    @property
    def parameters(self) -> int:
        """Values of all parameters, quantized or not."""
        return self.plan.parameters

    @property
    def bytes_before(self) -> int:
        return self.plan.bytes_before

    @property
    def bytes_after(self) -> int:
        return self.plan.bytes_after

    @property
    def bits_per_weight(self) -> float:
        """`8 bytes_after / parameters`: over the whole model."""
        return 8.0 * self.bytes_after / max(self.parameters, 1)

    def __str__(self) -> str:
        from ._show import account_table

        return account_table(self)
