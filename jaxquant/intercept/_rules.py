"""Recipes: ordered rules from a site to how it is quantized. Values; text is parsed elsewhere."""

import dataclasses
import fnmatch

from ..qarray import Scheme


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
    """

    match: str
    weights: Scheme | None = None
    activations: Scheme | None = None
    products: Scheme | None = None
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
