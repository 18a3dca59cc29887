"""A small CNN (Linen) and a small ViT (NNX), trained here on Fashion-MNIST, by each recipe."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fashion_mnist import CLASSES, Data, read
from flax import linen as nn, nnx, serialization, traverse_util

import jaxquant as jq
from jaxquant import recipes
from jaxquant.models import variables_inventory

_INT4_CONV = jq.Scheme(
    values=jq.INT4,
    # Up to 64 neighbours: input channels first, then places of the kernel.
    tile=jq.Tile(contracted=64, ragged=True),
    scale=jq.BFLOAT16,
    range=jq.AbsMax(convention=jq.Convention.SIGNED),
)
W4A16_CONV = jq.Recipe(
    name="w4a16_g64",
    source="w4a16_g64 with tiles that may be short, for kernels whose axes 64 does not divide",
    rules=(jq.Rule(match="*", weights=_INT4_CONV),),
)
BATCH = 256
# Test accuracy that each recipe may lose against float32, in points.
MOST_LOST = {"w8a16": 0.3, "w8a8": 0.5, "w4a16_g64": 3.0}


class CNN(nn.Module):
    """Three convolutions, a depthwise one among them, a mean and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, name="one")(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2, name="two")(x))
        x = nn.relu(nn.Conv(64, (3, 3), feature_group_count=64, name="depthwise")(x))
        x = nn.relu(nn.Conv(128, (3, 3), name="three")(x))
        return nn.Dense(CLASSES, name="classifier")(jnp.mean(x, axis=(1, 2)))


class Encoder(nnx.Module):
    """A block of the transformer, norms first."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        q, k, v = (
            part.reshape(batch, length, self.heads, -1)
            for part in jnp.split(self.qkv(self.attention_norm(x)), 3, axis=-1)
        )
        x = x + self.out(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class ViT(nnx.Module):
    """49 patches of 4 x 4 pixels, four blocks, the mean of what comes out, a linear layer."""

    def __init__(self, *, width: int = 64, layers: int = 4, heads: int = 4, rngs: nnx.Rngs):
        self.patch_embed = nnx.Linear(16, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 49, width)))
        self.layers = nnx.List([Encoder(width, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.classifier = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        patches = x.reshape(-1, 7, 4, 7, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 49, 16)
        x = self.patch_embed(patches) + self.positions[...]
        for layer in self.layers:
            x = layer(x)
        return self.classifier(jnp.mean(self.norm(x), axis=1))


def trained(
    call: Callable[[Any, jax.Array], jax.Array], params: Any, data: Data, epochs: int
) -> Any:
    """`params` after `epochs` of AdamW with a cosine schedule; every run gives the same numbers."""
    steps = len(data.labels) // BATCH
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 4, steps * epochs), weight_decay=1e-2
    )

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = call(params, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, images, labels)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    rng = np.random.default_rng(0)
    state = optimizer.init(params)
    for epoch in range(epochs):
        order, values = rng.permutation(len(data.labels)), []
        for at in range(steps):
            rows = order[at * BATCH : (at + 1) * BATCH]
            images = data.images[rows]
            # Mirrored at random, all the augmentation there is.
            images = np.where(
                rng.integers(2, size=(BATCH, 1, 1, 1)) > 0, images[:, :, ::-1], images
            )
            params, state, value = step(params, state, images, data.labels[rows])
            values.append(value)
        print(f"  epoch {epoch + 1} of {epochs}: loss {np.mean(values[-50:]):.4f}", flush=True)
    return params


def cached(file: pathlib.Path, start: Any, make: Callable[[], Any]) -> Any:
    """The arrays of `file` in the form of `start`; made and written if there is no such file."""
    if file.is_file():
        with np.load(file) as held:
            flat = {tuple(name.split("/")): jnp.asarray(held[name]) for name in held.files}
        return serialization.from_state_dict(start, traverse_util.unflatten_dict(flat))
    made = make()
    flat = traverse_util.flatten_dict(serialization.to_state_dict(made), sep="/")
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{name: np.asarray(array) for name, array in flat.items()})
    return made


def accuracy(call: Callable[[jax.Array], jax.Array], data: Data) -> float:
    """Percent of `data` that is classified right; whole batches only."""
    batch = 500
    right = [
        np.asarray(call(jnp.asarray(data.images[at : at + batch]))).argmax(1)
        == data.labels[at : at + batch]
        for at in range(0, len(data.labels), batch)
    ]
    return float(100 * np.mean(np.concatenate(right)))


def run(
    folder: pathlib.Path,
    weights: pathlib.Path,
    *,
    count: int | None,
    tests: int | None,
    epochs: int,
    quick: bool = False,
) -> dict[str, Any]:
    """Rows of test accuracies of both models."""
    train, test = read(folder, "train", count), read(folder, "t10k", tests)
    example = jnp.asarray(test.images[:500])
    rows: list[dict[str, Any]] = []

    def add(model: str, recipe: str, bits: float, sites: int, call: Callable[..., Any]) -> None:
        row = {"model": model, "recipe": recipe, "bits": bits, "sites": sites}
        rows.append({**row, "accuracy": accuracy(call, test)})

    cnn = CNN()
    start = cnn.init(jax.random.key(0), example)
    variables = cached(weights / "cnn.npz", start, lambda: trained(cnn.apply, start, train, epochs))
    apply = jax.jit(cnn.apply)
    add("cnn", "float32", 32.0, 0, lambda x: apply(variables, x))
    for recipe in (recipes.W8A16, recipes.W8A8, W4A16_CONV)[1 if quick else 0 :]:
        plan = jq.plan(cnn, variables, example, recipe=recipe)
        held = jq.quantize(variables, plan)
        qapply = jax.jit(jq.wrap(cnn, plan).apply)
        bits = variables_inventory(held).bits_per_weight
        add("cnn", recipe.name, bits, _sites(plan), lambda x: qapply(held, x))  # noqa: B023

    vit = ViT(rngs=nnx.Rngs(0))
    graph, state = nnx.split(vit)
    pure = nnx.to_pure_dict(state)

    def forward(params: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graph, _filled(state, params))(images)

    params = cached(weights / "vit.npz", pure, lambda: trained(forward, pure, train, epochs))
    vit = nnx.merge(graph, _filled(state, params))
    plain = nnx.jit(lambda model, x: model(x))
    add("vit", "float32", 32.0, 0, lambda x: plain(vit, x))
    for recipe in (recipes.W8A16, recipes.W8A8, recipes.W4A16_G64)[1 if quick else 0 :]:
        plan = jq.plan(vit, nnx.state(vit), example, recipe=recipe)
        held = jq.quantize(nnx.state(vit), plan)
        qvit = jq.wrap(vit, plan, held)
        bits = variables_inventory(held).bits_per_weight
        add("vit", recipe.name, bits, _sites(plan), lambda x: plain(qvit, x))  # noqa: B023
    return {"train": len(train.labels), "test": len(test.labels), "epochs": epochs, "rows": rows}


def _sites(plan: jq.Plan) -> int:
    return sum(site.weights is not None for site in plan.sites)


def _filled(state: Any, params: Any) -> Any:
    nnx.replace_by_pure_dict(filled := jax.tree.map(lambda x: x, state), params)
    return filled


def broken(result: dict[str, Any], slack: float = 0.0) -> list[str]:
    """What of the claim does not hold."""
    plain = {row["model"]: row["accuracy"] for row in result["rows"] if row["recipe"] == "float32"}
    return [
        f"{row['model']} {row['recipe']}: {row['accuracy']:.2f} % right, float32 "
        f"{plain[row['model']]:.2f} %, at most {MOST_LOST[row['recipe']] + slack} points less "
        f"claimed"
        for row in result["rows"]
        if row["recipe"] != "float32"
        and not row["accuracy"] >= plain[row["model"]] - MOST_LOST[row["recipe"]] - slack
    ]
