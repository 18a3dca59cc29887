"""A step of a block in FP8, compiled for chips that are not here: its products. See README.md."""

import argparse
import collections
import importlib.metadata
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxquant as jq
from jaxquant.aot import compile_for, Compiled, mesh_for, parse_target
from jaxquant.aot._hlo_text import Computation, read_module
from jaxquant.models import LlamaConfig, read_outline
from jaxquant.models._llama import Block

HERE = pathlib.Path(__file__).parent
SHAPES = HERE.parents[1] / "configs" / "shapes"
RECIPES = tuple(f"fp8_train_{kind}" for kind in ("delayed", "current", "row", "block", "mx"))
TARGETS = ("h100", "v5e", "7x")
LINEARS = 7
FP8 = ("f8e4m3fn", "f8e5m2")


class OneBlock(nnx.Module):
    """A block of a Llama, and the positions that it is called with."""

    def __init__(self, config: LlamaConfig):
        self.block = Block(config, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.block(x, jnp.arange(x.shape[1], dtype=jnp.int32))[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama_3_8b", help="a file of configs/shapes")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--recipes", nargs="+", default=["bfloat16", *RECIPES])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--quick", action="store_true", help="a narrow block; writes quick/")
    given = parser.parse_args()
    # A compiler for a chip is not asked whether there is one.
    jax.config.update("jax_platforms", "cpu")
    config = narrow() if given.quick else read_outline(SHAPES / f"{given.model}.json").config
    rows = []
    for recipe in given.recipes:
        step, arguments, residuals = step_of(config, recipe, 256 if given.quick else given.tokens)
        for target in given.targets:
            rows.append(row_of(recipe, target, step, arguments) | residuals)
            print(as_line(rows[-1]), flush=True)
    versions = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
    result = {"versions": versions, "model": given.model, "tokens": given.tokens, "rows": rows}
    out = HERE / "quick" if given.quick else HERE
    out.mkdir(exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(["", *HEAD, *map(as_line, rows)]))
    said = broken(rows)
    print("The claim does not hold:" if said else "the claim holds", *said, sep="\n  ")
    return 1 if said else 0


def narrow() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256, width=512, hidden=1024, layers=1, heads=8, kv_heads=4, head_dim=64,
        max_length=256, rope_theta=1e4, norm_epsilon=1e-5, tied=True,
    )  # fmt: skip


def step_of(config: LlamaConfig, recipe: str, tokens: int) -> tuple[Any, Any, dict[str, int]]:
    """Gradients of a block's weights and inputs as a jitted function, its arguments as shapes, and
    the bytes that its forward keeps for them."""
    model = nnx.eval_shape(lambda: OneBlock(config))
    variables = nnx.state(model)
    x = jax.ShapeDtypeStruct((1, tokens, config.width), jnp.bfloat16)
    if recipe == "bfloat16":
        graph = nnx.graphdef(model)

        def call(v: Any, x: Any) -> Any:
            return nnx.merge(graph, v)(x)

    else:
        plan = jq.plan(model, variables, x, recipe=jq.recipes.by_name(recipe))
        # Its checks look at values: zeros.
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), variables)
        started = jq.start_training(model, zeros, plan)
        variables = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), started)
        tmodel = jq.simulate(model, plan, started)
        call = tmodel.apply

    def loss(v: Any, x: Any) -> Any:
        return jnp.square(call(v, x).astype(jnp.float32)).mean()

    kept = jax.eval_shape(lambda v, x: jax.vjp(call, v, x)[1], variables, x)
    weights = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(variables)}
    leaves = [s for s in jax.tree.leaves(kept) if (s.shape, s.dtype) not in weights]
    residuals = {"residual_bytes": sum(s.size * s.dtype.itemsize for s in leaves)}
    return jax.jit(jax.grad(loss, argnums=(0, 1))), (variables, x), residuals


def row_of(recipe: str, target_text: str, step: Any, arguments: Any) -> dict[str, Any]:
    target, shape = parse_target(target_text)
    mesh = mesh_for(target, shape, {"one": target.devices(shape)})
    begun = time.perf_counter()
    compiled = compile_for(step, arguments, target, mesh=mesh, schedule=False)
    return {
        "recipe": recipe,
        "target": target.name,
        "seconds": time.perf_counter() - begun,
        "products": products(compiled),
        "temporaries": compiled.memory.temporaries,
    }


def products(compiled: Compiled) -> dict[str, int]:
    """How many products the program has, by the types of their sides.

    What XLA made one of several (weights that read one input) is one here. `heads` are those with
    batched axes in wide types: attention's own.
    """
    module = read_module(compiled.text)
    found: collections.Counter[str] = collections.Counter()
    for computation in module.computations.values():
        for each in computation.instructions.values():
            if each.opcode not in ("dot", "convolution"):
                continue
            kinds = sorted(source(computation, name) for name in each.operands)
            batched = "lhs_batch_dims={" in each.attributes
            heads = batched and not any(kind in FP8 for kind in kinds)
            found["heads" if heads else " x ".join(kinds)] += 1
    return dict(found)


def source(computation: Computation, name: str) -> str:
    """The type of an operand; of one that is only converted, what it is converted from."""
    each = computation.instructions[name]
    while each.opcode in ("convert", "bitcast", "copy", "transpose", "reshape") and each.operands:
        before = computation.instructions[each.operands[0]]
        if before.shapes[0].type in FP8:
            return before.shapes[0].type + ("" if each.shapes[0].type in FP8 else " widened")
        each = before
    return each.shapes[0].type


HEAD = (
    "| recipe | target | products, by what they multiply | temporaries, MB | kept, MB |",
    "|---|---|---|---|---|",
)


def as_line(row: dict[str, Any]) -> str:
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(row["products"].items()))
    sizes = (f"{row[name] / 1e6:.0f}" for name in ("temporaries", "residual_bytes"))
    return f"| `{row['recipe']}` | {row['target']} | {found} | {' | '.join(sizes)} |"


def broken(rows: list[dict[str, Any]]) -> list[str]:
    """What of the claim does not hold."""
    said = []
    for row in rows:
        kinds = (kind for kind in row["products"] if kind != "heads")
        wide = {kind for kind in kinds if not all(part in FP8 for part in kind.split(" x "))}
        if row["target"] == "h100" and row["recipe"] in RECIPES[:4] and wide:
            said.append(f"{row['recipe']} on h100 has products of {', '.join(sorted(wide))}")
    return said


if __name__ == "__main__":
    raise SystemExit(main())
