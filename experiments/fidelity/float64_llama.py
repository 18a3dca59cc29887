"""The Llama forward pass in float64 NumPy, written from the papers: nothing of the package runs.

Touvron et al. 2023 (Llama), Su et al. 2021 (rotary positions), Ainslie et al. 2023 (grouped
queries); rotary pairs are `(i, i + head_dim / 2)`.
"""

from collections.abc import Mapping

import numpy as np

from jaxquant.models import LlamaConfig


def logits(
    parameters: Mapping[str, np.ndarray], config: LlamaConfig, tokens: np.ndarray
) -> np.ndarray:
    """`[length, vocab]` for one row of token ids."""
    if not config.tied or config.qkv_bias or config.rope_factors is not None:
        raise ValueError(
            "This reference has tied logits, no biases and plain rotations, as SmolLM2 does; "
            f"the model is {config}."
        )

    def weight(name: str) -> np.ndarray:
        return np.asarray(parameters[name]).astype(np.float64)

    embedding = weight("embed/embedding")
    angles = _angles(config, len(tokens))
    x = embedding[tokens]
    for layer in range(config.layers):
        at = f"layers/{layer}"
        seen = _norm(x, weight(f"{at}/attention_norm/scale"), config.norm_epsilon)
        q, k, v = (seen @ weight(f"{at}/attention/{name}/kernel") for name in "qkv")
        x = x + _attend(q, k, v, angles, config) @ weight(f"{at}/attention/o/kernel")
        seen = _norm(x, weight(f"{at}/mlp_norm/scale"), config.norm_epsilon)
        gate = seen @ weight(f"{at}/mlp/gate/kernel")
        up = seen @ weight(f"{at}/mlp/up/kernel")
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(f"{at}/mlp/down/kernel")
    return _norm(x, weight("norm/scale"), config.norm_epsilon) @ embedding.T


def _norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def _angles(config: LlamaConfig, length: int) -> np.ndarray:
    pairs = np.arange(0, config.head_dim, 2) / config.head_dim
    return np.arange(length)[:, None] * config.rope_theta**-pairs


def _rotated(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """`[heads, length, head_dim]`, each pair turned by its position's angle."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, angles: np.ndarray, config: LlamaConfig
) -> np.ndarray:
    length = len(q)
    q, k, v = (x.reshape(length, -1, config.head_dim).swapaxes(0, 1) for x in (q, k, v))
    q, k = _rotated(q, angles), _rotated(k, angles)
    group = config.heads // config.kv_heads
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    scores = q @ k.swapaxes(1, 2) / np.sqrt(config.head_dim)
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = weights / weights.sum(axis=-1, keepdims=True) @ v
    return out.swapaxes(0, 1).reshape(length, -1)
