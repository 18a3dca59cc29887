"""Recipes: ordered rules from a site to how it is quantized. Values; text is parsed elsewhere."""

import dataclasses
import fnmatch
from typing import Any, Protocol, runtime_checkable

from ..numerics import AbsMean, RootMeanSquare
from ..ops import Outliers
from ..qarray import Scheme
from ..training import LoRA, Training


@runtime_checkable
class Algorithm(Protocol):
    """How codes are chosen at a site: a frozen value, whose `repr` tells it from others.

    `observers` are the statistics of a site's inputs that it needs; `()` where weights are enough.
    """

    @property
    def name(self) -> str: ...

    @property
    def observers(self) -> tuple[Any, ...]: ...

    def run(self, w: Any, statistics: Any, scheme: Scheme) -> Any: ...


@runtime_checkable
class Scaling(Protocol):
    """How the inputs that sites have in common are scaled before weights are rounded.

    A frozen value, whose `repr` tells it from others. It needs data, whatever its `observers` are.
    """

    @property
    def name(self) -> str: ...

    @property
    def observers(self) -> tuple[Any, ...]: ...

    def candidates(self, *arguments: Any, **options: Any) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What is done at the sites that `match` names.

    `match` is a shell pattern (`*`, `?`, `[...]`) on the whole path of a parameter,
    `layers/0/mlp/up/kernel`, or on a whole site, `embed/embedding#take`. With `weights=None` the
    site is left as it is, on purpose. `optional` permits that nothing matches.
    `products` names products of two activations instead, `*/attention#product*`: both sides are
    rounded with that scheme. Such a rule speaks of no weights, and one with `weights` of no
    products; a rule with neither leaves both. Only recipes that have such a rule list products.
    `elsewhere` is what happens where a quantized parameter is read by an operation that is no
    site: an error, or it is dequantized there.

    `algorithm` chooses the codes; `None` is rounding to nearest. `scaling` chooses by what the
    inputs are divided and the weights multiplied first. With `static` the scales of activations
    come from calibration, by the range rule of their scheme, not from the activations themselves.
    `outliers` are columns of activations that are multiplied in floats. `training` says how
    gradients go past the roundings, and what is learned beside the weights (`jaxquant.simulate`).
    `adapter` puts trainable matrices beside frozen weights (`jaxquant.add_adapters`).
    """

    match: str
    weights: Scheme | None = None
    activations: Scheme | None = None
    products: Scheme | None = None
    algorithm: Algorithm | None = None
    scaling: Scaling | None = None
    static: bool = False
    outliers: Outliers | None = None
    training: Training | None = None
    adapter: LoRA | None = None
    optional: bool = False
    elsewhere: str = "error"

    def __post_init__(self) -> None:
        if self.activations is not None and self.weights is None:
            raise ValueError(
                f"The rule {self.match!r} quantizes activations but no weights. Give both schemes, "
                "or weights alone."
            )
        if self.products is not None and self.weights is not None:
            raise ValueError(
                f"The rule {self.match!r} quantizes weights and products of activations. Give each "
                "a rule of its own."
            )
        if self.elsewhere not in ("error", "dequantize"):
            raise ValueError(
                f"elsewhere={self.elsewhere!r} in the rule {self.match!r}; it is 'error' or "
                "'dequantize'."
            )
        for what, kind, such in (
            ("algorithm", Algorithm, "GPTQ()"),
            ("scaling", Scaling, "AWQ()"),
        ):
            value = getattr(self, what)
            if value is not None and (isinstance(value, type) or not isinstance(value, kind)):
                raise TypeError(
                    f"The rule {self.match!r} has {value!r} as its {what}. Give a value such as "
                    f"jaxquant.algorithms.{such}."
                )
            if value is not None and self.weights is None:
                raise ValueError(
                    f"The rule {self.match!r} has the {what} {value} but no weights "
                    f"to quantize. Give it weights, or no {what}."
                )
        if self.static:
            self._check_static()
        if self.outliers is not None:
            self._check_outliers()
        if self.training is not None:
            self._check_training()
        if self.adapter is not None and (self.weights is None or self.training is not None):
            raise ValueError(
                f"The rule {self.match!r} has an adapter, which stands beside weights that are "
                "quantized and do not change. Give it weights, and no training."
            )

    def _check_training(self) -> None:
        assert self.training is not None
        if self.weights is None:
            raise ValueError(
                f"The rule {self.match!r} trains, but quantizes no weights. Give it weights, or "
                "leave out training."
            )
        for name in ("algorithm", "scaling", "outliers"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"The rule {self.match!r} trains and has {name}={getattr(self, name)}, which "
                    "is about weights that no longer change. Leave out one of the two."
                )
        reason = self.training.check(self.weights, self.activations, self.static)
        if reason is not None:
            raise ValueError(f"The rule {self.match!r} cannot be trained: {reason}.")

    def _check_static(self) -> None:
        if self.activations is None:
            raise ValueError(
                f"The rule {self.match!r} is static but quantizes no activations, whose scales "
                "would be fixed. Give it activations, or leave out static."
            )
        if self.activations.tile.kept is not None:
            raise ValueError(
                f"The rule {self.match!r} is static, but its activations ({self.activations}) have "
                "scales for each token or for some of them, and the tokens are not known before "
                "the call. Give them Tile(contracted=..., kept=None), such as PER_TENSOR."
            )
        if isinstance(self.activations.scale, Scheme) or self.activations.centered:
            raise ValueError(
                f"The rule {self.match!r} is static, but its activations ({self.activations}) are "
                "centered or hold their scales as codes, which is not known before the call. Give "
                "them one plain scale a tile."
            )
        if isinstance(self.activations.range, (RootMeanSquare, AbsMean)):
            raise ValueError(
                f"The rule {self.match!r} is static, and no observer keeps what the range "
                f"{self.activations.range} is made of. Use AbsMax, MinMax, Percentile, "
                "MeanSquaredError, SharedExponent or Fixed."
            )

    def _check_outliers(self) -> None:
        if self.weights is None or self.activations is None:
            raise ValueError(
                f"The rule {self.match!r} keeps outliers apart, but does not quantize weights and "
                "activations: there is nothing to keep them from. Give both schemes."
            )
        if self.static:
            raise ValueError(
                f"The rule {self.match!r} is static and keeps outliers apart. The scale of what is "
                "left depends on which they are: leave out one of the two."
            )
        scheme = self.activations
        if scheme.zero_point is not None or scheme.centered or not scheme.values.has_zero:
            raise ValueError(
                f"The rule {self.match!r} keeps outliers apart, and puts the code 0 in their "
                f"place, which does not stand for 0 in {scheme}. Give its activations a symmetric "
                "scheme that holds 0."
            )

    def matches(self, path: str, site: str, *, product: bool = False) -> bool:
        """Whether this rule speaks of the site; `product` says that no weight is read there."""
        if (self.weights if product else self.products) is not None:
            return False
        return any(fnmatch.fnmatchcase(name, self.match) for name in (path, site))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Ordered rules; the first that matches a site decides. `source` says where it comes from."""

    name: str
    rules: tuple[Rule, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError(f"The recipe {self.name!r} has no rules. Give it at least one.")

    @property
    def has_products(self) -> bool:
        """Whether some rule quantizes products of activations."""
        return any(rule.products is not None for rule in self.rules)

    def rule_for(self, path: str, site: str, *, product: bool = False) -> Rule | None:
        """The first rule that matches, or `None`."""
        return next((r for r in self.rules if r.matches(path, site, product=product)), None)
