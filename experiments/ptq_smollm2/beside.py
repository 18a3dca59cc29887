"""GPTQ of the whole model and llm-compressor's at the same time, each on half of the cores.

`--peer` is the Python of an environment with llmcompressor and gguf. Prints seconds, what they
bought, and which share of the rate of plain products ours reached.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.models import find_smollm2

HERE = pathlib.Path(__file__).parent
LAYERS, WIDTH, KEYS, HIDDEN = 30, 576, 192, 1536
"""Of SmolLM2-135M."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--calibration", type=pathlib.Path, required=True)
    parser.add_argument("--evaluation", type=pathlib.Path, required=True)
    parser.add_argument("--row", default="sym_gptq")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    files = [f"--{n}={getattr(given, n).resolve()}" for n in ("calibration", "evaluation")]
    with tempfile.TemporaryDirectory() as folder:
        row = pathlib.Path(folder) / "row.json"
        theirs = [given.peer, str(HERE / "llm_compressor.py"), str(find_smollm2())]
        theirs += [*files, f"--threads={half}"]
        ours = [sys.executable, str(HERE / "one_row.py"), given.row, str(row)]
        ours += [*files, "--forward=float32"]
        with open(pathlib.Path(folder) / "peer.log", "w+", encoding="utf-8") as log:
            peer = started(theirs, cores[:half], log)
            if started(ours, cores[-half:], None).wait() != 0 or peer.wait() != 0:
                log.seek(0)
                sys.exit(f"a side failed; the peer wrote\n{log.read()[-2000:]}")
            log.seek(0)
            other = json.loads(log.read().splitlines()[-1])
        found = json.loads(row.read_text(encoding="utf-8"))
    os.sched_setaffinity(0, cores[-half:])
    tokens = np.load(given.calibration)["tokens"].size
    print(json.dumps(told(found, other, flop(tokens), matmul_rate()), indent=1))


def started(command: list[str], cores: list[int], log: Any) -> subprocess.Popen:
    environment = {"OPENBLAS_THREAD_TIMEOUT": "4", **os.environ}
    held = os.sched_getaffinity(0)
    # A child has the cores of its parent.
    os.sched_setaffinity(0, cores)
    made = subprocess.Popen(command, env=environment, stdout=log)
    os.sched_setaffinity(0, held)
    return made


def flop(tokens: int) -> dict[str, float]:
    """What there is to compute, at least: linears once, and the Gram matrices of their inputs.

    Attention, on top of it, is 8% of the linears' at 512 tokens.
    """
    linears = 2 * WIDTH * (WIDTH + KEYS) + 3 * WIDTH * HIDDEN
    grams = 3 * WIDTH**2 + HIDDEN**2
    return {name: 2 * LAYERS * tokens * x for name, x in (("linears", linears), ("grams", grams))}


def matmul_rate(rows: int = 4096) -> float:
    """FLOP a second of float32 products as large as the model's largest."""
    x, w = jnp.ones((rows, WIDTH)), jnp.ones((WIDTH, HIDDEN))
    product, seconds = jax.jit(jnp.matmul), []
    jax.block_until_ready(product(x, w))
    for _ in range(30):
        start = time.perf_counter()
        jax.block_until_ready(product(x, w))
        seconds.append(time.perf_counter() - start)
    return 2 * rows * WIDTH * HIDDEN / statistics.median(seconds)


def told(
    ours: dict[str, Any], peer: dict[str, Any], work: dict[str, float], rate: float
) -> dict[str, Any]:
    names = ("seconds", "rss_bytes", "kl", "nll_difference")
    running = ours["seconds"] - ours["compile_seconds"]
    return {
        "cores_each": peer["threads"],
        "jaxquant": {name: ours[name] for name in (*names, "compile_seconds")},
        "llm-compressor": {name: peer[name] for name in names},
        "times_as_fast": peer["seconds"] / ours["seconds"],
        "tflop": {name: x / 1e12 for name, x in work.items()},
        "gflop_per_second_of_products": rate / 1e9,
        "share_of_it": sum(work.values()) / running / rate,
    }


if __name__ == "__main__":
    main()
