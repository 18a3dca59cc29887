"""A step of quantization-aware training, compiled for a slice that is not here. See README.md."""

import argparse
import collections
import dataclasses
import importlib.metadata
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.lax import with_sharding_constraint
from jax.sharding import NamedSharding, PartitionSpec

import jaxquant as jq
from jaxquant.aot import Collective, compile_for, Compiled, mesh_for, parse_target
from jaxquant.intercept import stamped
from jaxquant.intercept._simulate import rounding_of
from jaxquant.models import Llama, LlamaConfig, read_outline
from jaxquant.qarray._qarray import tile_counts

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from training_loop import FSDP, placed

HERE = pathlib.Path(__file__).parent
SHAPES = HERE.parents[1] / "configs" / "shapes"
RECIPE = jq.Recipe(
    name="W4A8, learned scales of weights",
    rules=(
        jq.Rule(match="embed*"),
        jq.Rule(match="head*"),
        jq.Rule(
            match="*",
            weights=jq.Scheme(values=jq.INT4, tile=jq.PER_CHANNEL),
            activations=jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL),
            training=jq.training.Training(weights=jq.training.LSQ()),
        ),
    ),
)


class Decoder(Llama):
    """jaxquant's Llama as one trains it: rows dealt out, blocks computed again on the way back."""

    def features(self, tokens: Any) -> Any:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        again = nnx.remat(lambda block, x: by_rows(block(x, positions)[0]))
        x = by_rows(self.embed(tokens))
        for block in self.layers:
            x = again(block, x)
        return self.norm(x)


def by_rows(x: Any) -> Any:
    return with_sharding_constraint(x, PartitionSpec(FSDP))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama_3_8b", help="a file of configs/shapes")
    parser.add_argument("--target", default="v5e:4x8")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--quick", action="store_true", help="two layers; writes quick/")
    given = parser.parse_args()
    # A TPU's compiler is not asked whether there is a TPU.
    jax.config.update("jax_platforms", "cpu")
    config = read_outline(SHAPES / f"{given.model}.json").config
    if given.quick:
        config = dataclasses.replace(config, layers=2)
    begun = time.perf_counter()
    compiled = compiled_step(config, given.target, given.batch, given.length)
    result = {
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "libtpu", "optax")},
        **{name: getattr(given, name) for name in ("model", "target", "batch", "length")},
        "layers": config.layers,
        "seconds": time.perf_counter() - begun,
        "hbm_bytes": compiled.target.hbm_bytes,
        "fits": compiled.fits,
        "memory": dataclasses.asdict(compiled.memory) | {"total": compiled.memory.total},
        "exchanges": exchanges(compiled),
    }
    print(as_text(result))
    out = HERE / "quick" if given.quick else HERE
    out.mkdir(exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    said = broken(compiled, config)
    print("The claim does not hold:" if said else "the claim holds", *said, sep="\n  ")
    return 1 if said else 0


def compiled_step(config: LlamaConfig, target_text: str, batch: int, length: int) -> Compiled:
    """AdamW on the cross-entropy of the next token; weights in float32, computing in bfloat16."""
    target, shape = parse_target(target_text)
    mesh = mesh_for(target, shape, {FSDP: target.devices(shape)})
    model = nnx.eval_shape(
        lambda: Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    )

    def laid(tree: Any) -> Any:
        """Shapes, as the training loop of this folder lays arrays of these shapes out."""
        return jax.tree.map(
            lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies),
            *(tree, placed(tree, mesh)),
        )

    variables = laid(nnx.state(model))
    rows = NamedSharding(mesh, PartitionSpec(FSDP))
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32, sharding=rows)
    optimizer = optax.adamw(1e-5, mu_dtype=jnp.bfloat16)
    with jax.set_mesh(mesh):
        sample = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        plan = jq.plan(model, variables, sample, recipe=RECIPE)
        trained = stamped(variables, plan.fingerprint, {}, first_scales(plan, laid))
        tmodel = jq.simulate(model, plan, trained, gather=FSDP)

        def loss(v: Any, tokens: Any) -> Any:
            logits = by_rows(tmodel.apply(v, tokens[:, :-1]))
            chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
            return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()

        def step(v: Any, state: Any, tokens: Any) -> Any:
            value, gradients = jax.value_and_grad(loss)(v, tokens)
            updates, state = optimizer.update(gradients, state, v)
            return optax.apply_updates(v, updates), state, value

        moments = laid(jax.eval_shape(optimizer.init, trained))
        places = jax.tree.map(lambda x: x.sharding, (trained, moments))
        whole = NamedSharding(mesh, PartitionSpec())
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*places, whole))
        return compile_for(jitted, (trained, moments, tokens), target, mesh=mesh, schedule=False)


def first_scales(plan: jq.Plan, laid: Any) -> dict[str, Any]:
    """The shapes of what `start_training` would make: nothing here has values."""
    found = {}
    for leaf in plan.leaves:
        counts = tile_counts(leaf.shape, rounding_of(plan, leaf).tile(leaf.shape))
        found[leaf.path] = {"scale": laid(jax.ShapeDtypeStruct(counts, jnp.float32))}
    return found


def exchanges(compiled: Compiled) -> list[dict[str, Any]]:
    """Collectives by kind and type, those that move most bytes first."""
    sums: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for each in compiled.hlo.collectives:
        types = ", ".join(sorted({shape.partition("[")[0] for shape in each.shapes}))
        sums[each.kind, types][0] += each.runs
        sums[each.kind, types][1] += each.runs * each.bytes
    rows = [
        {"kind": kind, "types": types, "runs": runs, "bytes": size}
        for (kind, types), (runs, size) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def broken(compiled: Compiled, config: LlamaConfig) -> list[str]:
    """What of the claim does not hold."""
    said = [] if compiled.fits else ["the step does not fit"]
    gathered = [each for each in compiled.hlo.collectives if each.kind == "all-gather"]
    weights = [each for each in gathered if of_a_block(each, config)]
    floats = [each for each in weights if not each.shapes[0].startswith("s4[")]
    said += [f"{each.name} gathers {each.shapes[0]}" for each in floats]
    # Once on the way there, and once on the way back.
    wanted = 2 * 7 * config.layers
    found = sum(each.runs for each in weights)
    return said + ([] if found == wanted else [f"{found} weights gathered, {wanted} wanted"])


def of_a_block(each: Collective, config: LlamaConfig) -> bool:
    """Whether what is gathered is a weight that the recipe quantizes."""
    widths = {config.width, config.hidden}
    heads = {h * config.head_dim for h in (config.heads, config.kv_heads)}
    dims = [int(d) for d in each.shapes[0].partition("[")[2].rstrip("]").split(",") if d]
    return len(dims) == 2 and set(dims) <= widths | heads


def as_text(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = ["| a device | GB |", "|---|---|"]
    lines += [f"| {name} | {size / 1e9:.2f} |" for name, size in result["memory"].items()]
    lines += ["", "| exchange | type | times | GB in all |", "|---|---|---|---|"]
    lines += [
        f"| {row['kind']} | {row['types']} | {row['runs']:,} | {row['bytes'] / 1e9:.3f} |"
        for row in result["exchanges"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
