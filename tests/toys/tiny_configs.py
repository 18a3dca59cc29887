"""The smallest Llama in which every size differs from its neighbours and query heads share keys."""

from jaxquant.models import LlamaConfig

LLAMA = LlamaConfig(
    vocab_size=48,
    width=32,
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rope_theta=1e4,
    norm_epsilon=1e-5,
    max_length=64,
    tied=True,
)
