"""The PyTorch side: the same model, tokens and score as run.py, in float32. Runs under an
interpreter that has torch.

Reads one JSON line a round on stdin (`{"windows": [first, last]}`), answers with one on stdout, so
that run.py can alternate the two sides. Weights come from the `.npz` that run.py writes, so no
loading code is shared or compared.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch
from torch.nn.functional import (
    cross_entropy,
    embedding,
    linear,
    rms_norm,
    scaled_dot_product_attention,
    silu,
)


def forward(weights: dict[str, torch.Tensor], config: dict, tokens: torch.Tensor) -> torch.Tensor:
    """[batch, length] tokens to [batch, length, vocab] logits."""
    batch, length = tokens.shape
    half = config["head_dim"] // 2
    frequencies = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = (torch.arange(length, dtype=torch.float64)[:, None] * frequencies).float()
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

    def split(x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.view(batch, length, heads, -1).transpose(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., :half], x[..., half:]
        return x * cos + torch.cat([-second, first], -1) * sin

    x = embedding(tokens, weights["embed/embedding"])
    for layer in range(config["layers"]):
        at = f"layers/{layer}/"
        w = {name[len(at) :]: weights[name] for name in weights if name.startswith(at)}
        y = rms_norm(x, x.shape[-1:], w["attention_norm/scale"], config["norm_epsilon"])
        q = rotate(split(linear(y, w["attention/q/kernel"]), config["heads"]))
        k = rotate(split(linear(y, w["attention/k/kernel"]), config["kv_heads"]))
        v = split(linear(y, w["attention/v/kernel"]), config["kv_heads"])
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + linear(y.transpose(1, 2).reshape(batch, length, -1), w["attention/o/kernel"])
        y = rms_norm(x, x.shape[-1:], w["mlp_norm/scale"], config["norm_epsilon"])
        x = x + linear(
            silu(linear(y, w["mlp/gate/kernel"])) * linear(y, w["mlp/up/kernel"]),
            w["mlp/down/kernel"],
        )
    x = rms_norm(x, x.shape[-1:], weights["norm/scale"], config["norm_epsilon"])
    return linear(x, weights["embed/embedding"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--weights", required=True, help=".npz of float32 arrays, matrices [out, in]"
    )
    parser.add_argument("--config", required=True, help="JSON text")
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with np.load(arguments.weights) as file:
        weights = {name: torch.from_numpy(file[name]) for name in file.files}
    with np.load(arguments.tokens) as file:
        tokens = torch.from_numpy(file["tokens"].astype(np.int64))
    config = json.loads(arguments.config)
    for line in sys.stdin:
        first, last = json.loads(line)["windows"]
        start = time.perf_counter()
        scores = []
        with torch.inference_mode():
            for at in range(first, last, arguments.batch):
                batch = tokens[at : min(at + arguments.batch, last)]
                logits = forward(weights, config, batch)[:, :-1]
                loss = cross_entropy(
                    logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1), reduction="none"
                )
                scores += loss.view(len(batch), -1).double().mean(1).tolist()
        seconds = time.perf_counter() - start
        print(
            json.dumps({"nll_per_window": scores, "seconds": seconds, "torch": torch.__version__}),
            flush=True,
        )


if __name__ == "__main__":
    main()
