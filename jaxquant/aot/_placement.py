"""Where the arrays of a Llama-family model lie on a slice, for tensor parallelism. Data.

Shoeybi et al. 2019 (Megatron-LM, arXiv:1909.08053): of each pair of products the first is cut by
outputs and the second by inputs, so that one sum over devices ends attention and one the MLP.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping

from jax.sharding import PartitionSpec

from ..models import LlamaConfig

KEYS, REST = "kv", "rest"
"""Names of the mesh's axes: key heads are dealt out over the first. Where there are more devices
than these fill, the second splits the query heads that share one, and the cache by rows."""

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """A mesh's axes, and how parameters and the cache are cut.

    `rules` are patterns of paths, of which the first that matches counts, in the form that
    `jaxquant.load(sharding=(mesh, rules))` takes. `cache` is of `[batch, length, kv_heads,
    head_dim]`, `logits` of `[batch, one, vocab]`.
    """

    axes: Mapping[str, int]
    rules: Mapping[str, PartitionSpec]
    cache: PartitionSpec
    logits: PartitionSpec

    def spec(self, path: str) -> PartitionSpec:
        """How the parameter at `path` is cut."""
        return next(
            spec for pattern, spec in self.rules.items() if fnmatch.fnmatchcase(path, pattern)
        )


def tensor_parallel(config: LlamaConfig, devices: int, *, batch: int, length: int) -> Placement:
    """The placement over `devices` for `batch` rows and a cache of `length` tokens.

    An array is cut by as many devices as divide it in whole heads or in whole columns, and is whole
    on the others. The cache is cut by key heads, then by rows, else by tokens.
    """
    keys = math.gcd(devices, config.kv_heads)
    rest = devices // keys
    axes = {KEYS: keys} if rest == 1 else {KEYS: keys, REST: rest}

    def names(count: int, *tried: Names) -> Names | None:
        """The first of `tried` whose devices divide `count`, of which `None` is none."""
        for each in tried:
            there = tuple(name for name in each if axes.get(name, 1) > 1)
            if there and count % math.prod(axes[name] for name in there) == 0:
                return there
        return None

    every: tuple[Names, ...] = ((KEYS, REST), (KEYS,), (REST,))
    heads, hidden = names(config.heads, *every), names(config.hidden, *every)
    kv_heads, vocab = names(config.kv_heads, (KEYS,)), names(config.vocab_size, *every)
    rows = names(batch, (REST,))
    tokens = None if rows else names(length, (REST,))
    whole = PartitionSpec()
    rules = {
        "*/attention/q/kernel": PartitionSpec(None, heads),
        "*/attention/q/bias": PartitionSpec(heads),
        "*/attention/k/kernel": PartitionSpec(None, kv_heads),
        "*/attention/k/bias": PartitionSpec(kv_heads),
        "*/attention/v/kernel": PartitionSpec(None, kv_heads),
        "*/attention/v/bias": PartitionSpec(kv_heads),
        "*/attention/o/kernel": PartitionSpec(heads, None),
        "*/mlp/gate/kernel": PartitionSpec(None, hidden),
        "*/mlp/up/kernel": PartitionSpec(None, hidden),
        "*/mlp/down/kernel": PartitionSpec(hidden, None),
        "embed/embedding": PartitionSpec(vocab, None),
        "head/kernel": PartitionSpec(None, vocab),
        "*": whole,
    }
    return Placement(
        axes=axes,
        rules=rules,
        cache=PartitionSpec(rows, tokens, kv_heads, None),
        logits=PartitionSpec(None, None, vocab),
    )
