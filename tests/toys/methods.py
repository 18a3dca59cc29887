"""Algorithms and scalings that do nothing, for what is said of them rather than done."""

import dataclasses
import enum

import jaxquant as jq


class Order(enum.Enum):
    STORED = "stored"
    FALLING = "falling"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    steps: int = 10
    shrink: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Informed:
    """An algorithm that needs data, with a setting of each kind."""

    order: Order = Order.STORED
    damping: float = 0.01
    blocks: int | None = 128
    careful: bool = False
    range: jq.ranges.Range | None = None
    search: Search | None = None

    @property
    def name(self):
        return "informed"

    @property
    def observers(self):
        return (jq.observers.Gram(),)

    def run(self, w, statistics, scheme):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Free:
    """An algorithm that needs none."""

    rounds: int = 20
    name: str = dataclasses.field(default="free", init=False)
    observers: tuple = dataclasses.field(default=(), init=False)

    def run(self, w, statistics, scheme):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Smooth:
    """A scaling."""

    alpha: float | tuple[float, ...] = 0.5
    name: str = "smooth"

    @property
    def observers(self):
        return (jq.observers.Peak(),)

    def candidates(self, peak, weights):
        raise NotImplementedError


ALGORITHMS = {"informed": Informed, "free": Free}
SCALINGS = {"smooth": Smooth}
