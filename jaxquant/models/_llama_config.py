"""What a Llama-family model is, apart from its numbers."""

import dataclasses
import math

_SIZES = (
    *("vocab_size", "width", "hidden", "layers"),
    *("heads", "kv_heads", "head_dim", "max_length"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and choices of a Llama-family decoder; checked when made.

    Raises:
      ValueError: a size that is no positive integer, heads that do not share key heads evenly, an
        odd `head_dim`, or the wrong number of `rope_factors`.
    """

    vocab_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    norm_epsilon: float
    max_length: int  # Tokens the model was trained for; nothing here stops at it.
    tied: bool  # Logits come from the embedding; otherwise from `head`.
    qkv_bias: bool = False
    # One a rotated pair: how many times slower it turns. `None`: as is.
    rope_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for field in _SIZES:
            size = getattr(self, field)
            if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 1 << 31:
                raise ValueError(
                    f"LlamaConfig.{field} is {size!r}; a positive integer is wanted. Correct the "
                    f"config."
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"LlamaConfig has {self.heads} heads and {self.kv_heads} kv_heads, which do not "
                f"divide them. "
                f"Correct the config."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"LlamaConfig.head_dim is {self.head_dim}; rotation pairs need it even. Correct "
                f"the config."
            )
        for field in ("rope_theta", "norm_epsilon"):
            number = getattr(self, field)
            if not (math.isfinite(number) and number > 0):
                raise ValueError(
                    f"LlamaConfig.{field} is {number!r}; a positive number is wanted. Correct the "
                    f"config."
                )
        if self.rope_factors is not None:
            if len(self.rope_factors) != self.head_dim // 2:
                raise ValueError(
                    f"LlamaConfig.rope_factors has {len(self.rope_factors)} numbers; head_dim "
                    f"{self.head_dim} wants "
                    f"{self.head_dim // 2}. Correct the config."
                )
            if not all(math.isfinite(factor) and factor > 0 for factor in self.rope_factors):
                raise ValueError(
                    "LlamaConfig.rope_factors must be positive numbers. Correct the config."
                )


def llama3_factors(
    *, head_dim: int, theta: float, factor: float, low: float, high: float, original_length: int
) -> tuple[float, ...]:
    """How many times slower each pair turns in Llama 3.1's long-context scaling.

    Pairs that turn more than `high` times within `original_length` tokens stay, those that turn
    less than `low` times are slowed by `factor`, and between the two frequencies are interpolated
    (`_compute_llama3_parameters` of transformers).

    Raises:
      ValueError: a number is not positive, or `high` is not above `low`.
    """
    positive = (theta, factor, low, high, original_length)
    if not all(math.isfinite(number) and number > 0 for number in positive) or high <= low:
        raise ValueError(
            f"The llama3 rope scaling has theta {theta}, factor {factor}, frequencies {low} to "
            f"{high} and length {original_length}; positive numbers, the second frequency above "
            f"the first, are wanted. Correct the config."
        )
    factors = []
    for pair in range(head_dim // 2):
        turns = original_length * theta ** (-2 * pair / head_dim) / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / (kept + (1 - kept) / factor))
    return tuple(factors)
