"""What calibrating a model of 1.1 billion parameters takes at most; not run by the tests.

    python tests/calibrate/measure_memory.py make FOLDER    # random weights, 2.2 GB
    python tests/calibrate/measure_memory.py run FOLDER     # prints the peak and the limit

The limit is 4 times the float32 bytes of a block, and 2 GB.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

import jaxquant as jq
from jaxquant.algorithms import GPTQ, Order
from jaxquant.calibrate import calibrate, Settings, token_batches
from jaxquant.models import open_model, save_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """By default that of TinyLlama-1.1B."""

    layers: int = 22
    width: int = 2048
    hidden: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32000

    @property
    def block(self) -> int:
        """Parameters of the linear layers of one block."""
        key = self.width * self.kv_heads // self.heads
        return 2 * self.width * (self.width + key) + 3 * self.width * self.hidden

    @property
    def limit(self) -> int:
        return 4 * 4 * self.block + 2 * 10**9

    def config(self) -> dict:
        return {
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.width // self.heads,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        }

    def layer(self, number: int) -> dict[str, tuple[int, ...]]:
        at, key = f"model.layers.{number}", self.width * self.kv_heads // self.heads
        return {
            f"{at}.input_layernorm.weight": (self.width,),
            f"{at}.post_attention_layernorm.weight": (self.width,),
            f"{at}.self_attn.q_proj.weight": (self.width, self.width),
            f"{at}.self_attn.k_proj.weight": (key, self.width),
            f"{at}.self_attn.v_proj.weight": (key, self.width),
            f"{at}.self_attn.o_proj.weight": (self.width, self.width),
            f"{at}.mlp.gate_proj.weight": (self.hidden, self.width),
            f"{at}.mlp.up_proj.weight": (self.hidden, self.width),
            f"{at}.mlp.down_proj.weight": (self.width, self.hidden),
        }

    def shards(self) -> Iterator[dict[str, tuple[int, ...]]]:
        yield {"model.embed_tokens.weight": (self.vocabulary, self.width)}
        yield from map(self.layer, range(self.layers))
        yield {
            "model.norm.weight": (self.width,),
            "lm_head.weight": (self.vocabulary, self.width),
        }


def make(folder: pathlib.Path, size: Size) -> None:
    """A Hugging Face folder of random bfloat16 weights, one shard in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(size.config()))
    rng = np.random.default_rng(0)
    weight_map, total = {}, size.layers + 2
    for number, shapes in enumerate(size.shards(), 1):
        file = f"model-{number:05}-of-{total:05}.safetensors"
        arrays = {}
        for name, shape in shapes.items():
            if len(shape) == 1:
                array = np.ones(shape, np.float32)
            else:
                array = rng.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
            arrays[name] = array.astype(ml_dtypes.bfloat16)
        safetensors.numpy.save_file(arrays, folder / file)
        weight_map |= dict.fromkeys(arrays, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peak() -> int:
    """The most memory that this process has had."""
    status = pathlib.Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def run(folder: pathlib.Path, size: Size, windows: int, length: int, memory: int) -> None:
    opened = open_model(folder)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, size.vocabulary, (windows, length))
    batches = token_batches(tokens, size.vocabulary, size=4)
    int4 = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=64), scale=jq.BFLOAT16)
    recipe = jq.Recipe(
        name="gptq",
        rules=(
            jq.Rule(match="*embed*"),
            jq.Rule(match="*head*"),
            jq.Rule(match="*", weights=int4, algorithm=GPTQ(order=Order.STATIC)),
        ),
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), opened.variables)
    plan = jq.plan(opened.model, shapes, *batches[0], recipe=recipe)
    start, last = time.perf_counter(), [0]
    print(f"planned: {peak() / 1e9:.2f} GB", flush=True)

    def progress(row: object, level: int, levels: int) -> None:
        if peak() > last[0] or level == levels:
            last[0] = peak()
            seconds = time.perf_counter() - start
            at = getattr(row, "root", row)
            print(f"{seconds:6.0f} s {last[0] / 1e9:.3f} GB {level}/{levels} {at}", flush=True)

    made = calibrate(
        opened.model,
        opened.variables,
        batches,
        plan,
        out=folder / "unfinished",
        settings=Settings(memory=memory),
        progress=progress,
    )
    print(f"calibrated after {time.perf_counter() - start:.0f} s: {peak() / 1e9:.2f} GB")
    save_model(folder / "saved", opened, made.qvariables, plan, account=made.account)
    found = {
        "parameters": size.layers * size.block + 2 * size.vocabulary * size.width,
        "tokens": windows * length,
        "seconds": round(time.perf_counter() - start),
        "peak": peak(),
        "limit": size.limit,
    }
    print(json.dumps(found))
    better = sum(row.error < row.nearest_error for row in made.sites)
    print(f"{better} of {len(made.sites)} sites err less than rounded to nearest")
    sys.exit(0 if peak() <= size.limit else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "run"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--memory", type=int, default=64 << 20, help="bytes of activations")
    arguments = parser.parse_args()
    size = Size(layers=arguments.layers)
    if arguments.what == "make":
        make(arguments.folder, size)
    else:
        jnp.zeros(()).block_until_ready()
        run(arguments.folder, size, arguments.windows, arguments.length, arguments.memory)


if __name__ == "__main__":
    main()
