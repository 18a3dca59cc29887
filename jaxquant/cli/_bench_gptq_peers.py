"""GPTQ as others run it, on our inputs. Imported only where their packages are there."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np


def qwix_gptq(w: np.ndarray, gram: np.ndarray, *, group: int) -> Callable[[], Any]:
    """qwix's `gptq_core.quantize_weight`, called as its own `gptq.quantize_params` does."""
    from qwix.contrib import gptq_core  # type: ignore[import-not-found]

    settings = {"qtype": jnp.int4, "channelwise_axes": (0,), "tiled_axes": {1: group}}
    how = gptq_core.qarray.HowToQuantize(**settings)
    held, matrix = jnp.asarray(w), jnp.asarray(gram)
    return lambda: gptq_core.quantize_weight(held, matrix, how)


def torch_gptq(
    w: np.ndarray, gram: np.ndarray, *, group: int, threads: int, block: int = 128
) -> Callable[[], Any]:
    """The loop of IST-DASLab's `gptq.py` and llm-compressor's `gptq_quantize.py`, symmetric 4 bits
    in groups, in float32."""
    import torch  # type: ignore[import-not-found]

    torch.set_num_threads(threads)
    held, matrix = torch.from_numpy(w.copy()), torch.from_numpy(gram.copy())

    def run() -> Any:
        left, h = held.clone(), matrix.clone()
        k = left.shape[1]
        diagonal = torch.arange(k)
        dead = torch.diag(h) == 0
        h[dead, dead] = 1
        left[:, dead] = 0
        h[diagonal, diagonal] += 0.01 * torch.mean(torch.diag(h))
        h = torch.linalg.cholesky(h)
        h = torch.cholesky_inverse(h)
        inverse = torch.linalg.cholesky(h, upper=True)
        codes = torch.zeros_like(left, dtype=torch.int8)
        for start in range(0, k, block):
            end = min(start + block, k)
            columns = left[:, start:end].clone()
            errors = torch.zeros_like(columns)
            own = inverse[start:end, start:end]
            for i in range(end - start):
                if (start + i) % group == 0:
                    peaks = left[:, start + i : start + i + group].abs().amax(dim=1)
                    scale = peaks / 7.5
                code = torch.clamp(torch.round(columns[:, i] / scale), -8, 7)
                codes[:, start + i] = code.to(torch.int8)
                error = (columns[:, i] - code * scale) / own[i, i]
                columns[:, i:] -= error.unsqueeze(1).matmul(own[i, i:].unsqueeze(0))
                errors[:, i] = error
            left[:, end:] -= errors.matmul(inverse[start:end, end:])
        return codes.numpy()

    return run
