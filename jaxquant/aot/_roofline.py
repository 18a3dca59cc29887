"""The least that a step of a decoder has to move and to compute, whatever the compiler makes of it.

Williams et al. 2009 (Roofline): the time is at least the bytes at the bandwidth of the memory, and
at least the operations at the rate of the matrix units, whichever is longer.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from ..intercept import Plan, SitePlan
from ..models import LlamaConfig
from ..qarray import Scheme
from ._targets import Target

FLOAT = "bf16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderStep:
    """One call: `rows` sequences of `new` tokens each, after `seen` that a cache holds.

    Logits are those of the last token of each row.
    """

    rows: int
    new: int
    seen: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """The bounds of one device: bytes of the main memory, operations by the operands' type.

    Exchanges between devices are not in it.
    """

    bytes: int
    operations: Mapping[str, float]
    memory_seconds: float
    compute_seconds: float

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.memory_seconds, self.compute_seconds)


def roofline(
    target: Target,
    config: LlamaConfig,
    plan: Plan | None,
    step: DecoderStep,
    *,
    devices: int,
    bytes: int,
) -> Roofline:
    """The bounds of `step` when its operations are dealt out evenly.

    `bytes` are those that a device must read and write once each. Operations are two for each
    weight and token, and for attention two products of each query with the keys and the values that
    it may see. They run at the rate of the narrowest type that both operands are held in: int8 or
    fp8 only where the plan rounds activations too, else bfloat16.
    """
    operations: dict[str, float] = {}

    def add(type_: str, count: float) -> None:
        known = type_ if type_ in target.matrix_ops else FLOAT
        operations[known] = operations.get(known, 0.0) + count / devices

    tokens = step.rows * step.new
    for path, shape, type_ in products(config, plan):
        inputs = step.rows if path in ("head/kernel", "embed/embedding") else tokens
        add(type_, 2.0 * math.prod(shape) * inputs)
    # The i-th new token sees those before it and itself.
    pairs = step.rows * (step.new * step.seen + step.new * (step.new + 1) / 2)
    add(FLOAT, 2 * 2.0 * config.layers * config.heads * config.head_dim * pairs)
    return Roofline(
        bytes=bytes,
        operations=operations,
        memory_seconds=bytes / target.hbm_bytes_per_second,
        compute_seconds=sum(n / target.matrix_ops[type_] for type_, n in operations.items()),
    )


def products(config: LlamaConfig, plan: Plan | None) -> Sequence[tuple[str, tuple[int, int], str]]:
    """Every product with a weight: its path, its shape, and the type that it may be computed in."""
    types = {} if plan is None else {s.path: _type(s) for s in plan.sites if s.op == "dot"}
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    width, hidden = config.width, config.hidden
    block = {
        "attention/q": (width, q),
        "attention/k": (width, kv),
        "attention/v": (width, kv),
        "attention/o": (q, width),
        "mlp/gate": (width, hidden),
        "mlp/up": (width, hidden),
        "mlp/down": (hidden, width),
    }
    every = [
        (f"layers/{layer}/{name}/kernel", shape)
        for layer in range(config.layers)
        for name, shape in block.items()
    ]
    every.append(("embed/embedding" if config.tied else "head/kernel", (width, config.vocab_size)))
    return [(path, shape, types.get(path, FLOAT)) for path, shape in every]


def _type(site: SitePlan) -> str:
    if site.weights is None or site.activations is None:
        return FLOAT
    return next(
        name for name, bits in _WIDTHS if _holds(name, bits, site.weights, site.activations)
    )


_WIDTHS = (("int4", 4), ("int8", 8), ("fp8", 8), (FLOAT, 16))


def _holds(name: str, bits: int, *schemes: Scheme) -> bool:
    """Whether codes of all `schemes` are operands of that type as they are."""
    if name == FLOAT:
        return True
    formats = [scheme.values for scheme in schemes]
    if name == "fp8":
        return all(not f.integer and f.table is None and f.bits == bits for f in formats)
    return all(f.integer and f.bits <= bits for f in formats)
