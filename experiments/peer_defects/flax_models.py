"""The models of the cases, in Flax. Both libraries are given these."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn, nnx
from jax import lax


class Layer(nn.Module):
    """One scanned layer."""

    features: int

    @nn.compact
    def __call__(self, x: Any, _: Any) -> tuple[Any, None]:
        return jnp.tanh(nn.Dense(self.features, use_bias=False, name="dense")(x)), None


class Scanned(nn.Module):
    """`h = tanh(h W_l)` for each layer, by `nn.scan`."""

    layers: int
    features: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        scan = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        return scan(self.features, name="layers")(x, None)[0]


class Mapped(nn.Module):
    """`y_l = x_l W_l`, by `nn.vmap`."""

    features: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        dense = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
        return dense(self.features, use_bias=False, name="dense")(x)


class ScannedNNX(nnx.Module):
    """`h = tanh(h W_l)` for each layer, by `nnx.scan`."""

    def __init__(self, layers: int, features: int, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(features, features, use_bias=False, rngs=rngs)

        self.layers = create(rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: Any, layer: Any) -> Any:
            return jnp.tanh(layer(x))

        return forward(x, self.layers)


class Ragged(nn.Module):
    """Rows of each group by the group's own expert."""

    experts: tuple[int, int, int]

    @nn.compact
    def __call__(self, x: Any, group_sizes: Any) -> Any:
        w = self.param("experts", nn.initializers.normal(), self.experts)
        return lax.ragged_dot(x, w, group_sizes)


class Einsum(nn.Module):
    """`jnp.einsum` with a weight `w`, which stands where `x` does not."""

    equation: str
    shape: tuple[int, ...]
    weight_at: int

    @nn.compact
    def __call__(self, *x: Any) -> Any:
        w = self.param("w", nn.initializers.normal(), self.shape)
        return jnp.einsum(self.equation, *x[: self.weight_at], w, *x[self.weight_at :])


class Tied(nn.Module):
    """Rows of an embedding, which is also what turns them into logits."""

    vocabulary: int
    features: int

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(self.vocabulary, self.features, name="embed")
        return embed.attend(jnp.tanh(embed(tokens)))


class Scores(nn.Module):
    """`(x tanh(x)^T) w`: an activation of the weight's shape comes first. Starts at `start`."""

    start: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        w = self.param("w", lambda key: jnp.asarray(self.start["w"]))
        scores = jnp.dot(x, jnp.tanh(x).T)
        return jnp.dot(scores, w)


class Twins(nn.Module):
    """`tanh(x a') b'`: two weights of one shape, each read through `view`. Starts at `start`."""

    start: Any
    view: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        a = self.param("a", lambda key: jnp.asarray(self.start["a"]))
        b = self.param("b", lambda key: jnp.asarray(self.start["b"]))
        # A view of one operand, and one that also takes indices.
        see = {
            "transposed": jnp.transpose,
            "sliced": lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(0), w.shape[0]),
        }[self.view]
        return jnp.dot(jnp.tanh(jnp.dot(x, see(a))), see(b))


Dense = functools.partial(nn.Dense, use_bias=False)
Conv = functools.partial(nn.Conv, use_bias=False)


def make(case: int, part: str, params: dict[str, Any]) -> Any:
    """The model of a case whose parameters have the shapes of `params`, by path."""
    shapes = {path: w.shape for path, w in params.items()}
    match case, part:
        case 1, "nn.scan":
            layers, _, features = shapes["layers/dense/kernel"]
            return Scanned(layers, features)
        case 1, "nn.vmap":
            return Mapped(shapes["dense/kernel"][-1])
        case 1, "nnx.scan":
            layers, _, features = shapes["layers/kernel"]
            return ScannedNNX(layers, features, rngs=nnx.Rngs(0))
        case ((7 | 8), _):
            return Ragged(shapes["experts"])
        case 9, _:
            *window, _, features = shapes["kernel"]
            return Conv(features, tuple(window))
        case 10, _:
            return Einsum("dk,bd->bk", shapes["w"], 0)
        case 11, _:
            return Tied(*shapes["embed/embedding"])
        case 12, _:
            return Einsum("bd,dk,bk->bk", shapes["w"], 1)
        case 13, _:
            return Scores(params)
        case 14, _:
            return Twins(params, part)
        case 4, "two axes":
            return nn.DenseGeneral(shapes["kernel"][-1], axis=(-2, -1), use_bias=False)
        case 4, "experts":
            return Einsum("ebd,edk->ebk", shapes["w"], 1)
    return Dense(shapes["kernel"][-1])


def nested(params: dict[str, Any]) -> dict[str, Any]:
    """A tree of JAX arrays from arrays by path."""
    tree: dict[str, Any] = {}
    for path, w in params.items():
        *folders, name = path.split("/")
        at = tree
        for folder in folders:
            at = at.setdefault(folder, {})
        at[name] = jnp.asarray(w)
    return tree


def bytes_of(tree: Any) -> float:
    """Bytes of all arrays of a tree, those of fewer than 8 bits counted as if packed."""
    return sum(x.size * jax.dtypes.itemsize_bits(x.dtype) for x in jax.tree.leaves(tree)) / 8


def products_of(jaxpr: Any) -> list[str]:
    """The dtypes of both sides of every product, inner ones too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(" x ".join(str(v.aval.dtype) for v in eqn.invars))
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                found += products_of(inner.jaxpr)
    return found
