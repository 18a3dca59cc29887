"""One row for each shape of Flax model that users bring, with the sites that it must have."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn, nnx
from flax.nnx import bridge
from jax.sharding import AxisType, PartitionSpec as P

D = 8
MESH = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
INIT = nn.initializers.lecun_normal()
STACK, BATCH, SUM, KEPT = "stack", "batch", "contracted", "kept"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """`make()` builds the model; `sites` has the roles of each site's stored axes."""

    name: str
    make: Callable[[], Any]
    sites: dict[str, tuple[str, ...]]
    args: tuple[Any, ...] = (jnp.linspace(-2.0, 2.0, 4 * D).reshape(4, D),)

    def __str__(self) -> str:
        return self.name


class Called(nn.Module):
    """Any function of a module in whose scope it may make submodules and parameters."""

    function: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        return self.function(self, x)


def linen(function):
    return lambda: Called(function)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(D, name="down")(nn.gelu(nn.Dense(2 * D, name="up")(x))), None


def scanned(axis, kind=Layer):
    def function(module, x):
        layers = nn.scan(
            kind, variable_axes={"params": axis}, split_rngs={"params": True}, length=3
        )
        return layers(name="layers")(x, None)[0]

    return linen(function)


def vmapped(axis):
    def function(module, x):
        heads = nn.vmap(
            nn.Dense,
            variable_axes={"params": axis},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=-1,
            axis_size=3,
        )
        return heads(5, name="heads")(x)

    return linen(function)


def remat(module, x):
    return nn.remat(Layer)(name="layer")(x)[0]


def tied(module, ids):
    embed = nn.Embed(11, D, name="embed")
    return embed.attend(nn.Dense(D, name="up")(embed(ids)))


def weight_first(module, x):
    w = module.param("w", INIT, (2, 3, D))
    return jnp.einsum("ked,nd->nke", w, x)


def three_operands(module, x):
    """The pair with the weight comes first, as there are fewer rows than channels."""
    up = module.param("up", INIT, (D, 2 * D))
    down = module.param("down", INIT, (2 * D, D))
    return jnp.einsum("nd,dh,hk->nk", x, up, down)


def bilinear(module, x):
    w = module.param("w", INIT, (D, D, 3))
    return jnp.einsum("nd,dek,ne->nk", x, w, nn.tanh(x))


def two_contracted(module, x):
    return nn.DenseGeneral(6, axis=(-2, -1), name="join")(x.reshape(4, 2, 4))


def attention(module, x):
    return nn.MultiHeadDotProductAttention(2, name="attention")(x, x)


def fused_and_split(module, x):
    """One fused parameter, taken apart by the model."""
    qkv = module.param("qkv", INIT, (D, 3 * D))
    q, k, v = jnp.split(qkv, 3, axis=1)
    return nn.softmax((x @ q) @ (x @ k).T) @ (x @ v)


def fused_and_sliced_rows(module, x):
    """Halves of the rows, each with a product of its own."""
    w = module.param("w", INIT, (2 * D, D))
    return jnp.tanh(x @ w[:D]) @ w[D:]


def joined(module, x):
    """Three parameters, fused by the model."""
    ws = [module.param(name, INIT, (D, D)) for name in "qkv"]
    q, k, v = jnp.split(x @ jnp.concatenate(ws, axis=1), 3, axis=-1)
    return nn.softmax(q @ k.T) @ v


def stacked(module, x):
    ws = [module.param(name, INIT, (D, D)) for name in "qkv"]
    q, k, v = jnp.einsum("nd,sdh->snh", x, jnp.stack(ws))
    return nn.softmax(q @ k.T) @ v


def sharded_body(module, x):
    w = module.param("w", INIT, (D, 12))
    product = jax.shard_map(
        jnp.matmul, mesh=MESH, in_specs=(P(), P(None, "d")), out_specs=P(None, "d")
    )
    return product(x, w)


def nnx_inside(module, x):
    x = nn.Dense(D, name="up")(x)
    return bridge.ToLinen(nnx.Linear, args=(D, 6), name="inner")(nn.tanh(x))


class NNXLayer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return x + nnx.gelu(self.linear(x))


@nnx.split_rngs(splits=3)
@nnx.vmap(in_axes=0, out_axes=0)
def three_layers(rngs):
    return NNXLayer(rngs)


class NNXScanned(nnx.Module):
    def __init__(self, rngs, remat=False):
        self.layers, self.remat = three_layers(rngs), remat

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return nnx.remat(NNXLayer.__call__)(layer, x) if self.remat else layer(x)

        return forward(x, self.layers)


class NNXVmapped(nnx.Module):
    def __init__(self, rngs):
        self.layers = three_layers(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, 0))(self.layers, x)


class NNXRemat(nnx.Module):
    def __init__(self, rngs):
        self.layer = NNXLayer(rngs)

    def __call__(self, x):
        return nnx.remat(NNXLayer.__call__)(self.layer, x)


class NNXTied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, D, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(self.embed(ids))


class NNXJoined(nnx.Module):
    def __init__(self, rngs):
        self.q, self.k, self.v = (nnx.Linear(D, D, use_bias=False, rngs=rngs) for _ in range(3))

    def __call__(self, x):
        fused = jnp.concatenate([self.q.kernel, self.k.kernel, self.v.kernel], axis=1)
        q, k, v = jnp.split(x @ fused, 3, axis=-1)
        return nnx.softmax(q @ k.T) @ v


class LinenInside(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, D, rngs=rngs)
        self.inner = bridge.ToNNX(nn.Dense(6), rngs=rngs)
        bridge.lazy_init(self.inner, jnp.ones((4, D)))

    def __call__(self, x):
        return self.inner(jnp.tanh(self.up(x)))


class NNXAttention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(x)


def own(kind, **options):
    return lambda: kind(nnx.Rngs(0), **options)


def loop_of_layers(lead):
    def roles(axis):
        found = [SUM, KEPT]
        found.insert(axis, STACK)
        return tuple(found)

    return {"layers/up/kernel#dot": roles(lead), "layers/down/kernel#dot": roles(lead)}


MATRIX = (SUM, KEPT)
IDS = (jnp.array([[1, 2, 10], [0, 5, 1]]),)
ROWS = jnp.sin(jnp.arange(2.0 * 3 * D)).reshape(2, 3, D)
HEADS = {f"attention/{n}/kernel#dot": (SUM, KEPT, KEPT) for n in ("query", "key", "value")}
HEADS |= {"attention/out/kernel#dot": (SUM, SUM, KEPT)}
QKV = {f"{n}#dot": MATRIX for n in "qkv"}
TIED = {"embed/embedding#take": (KEPT, SUM), "embed/embedding#dot": (KEPT, SUM)}

ROWS_OF_LINEN = (
    Row(name="scan", make=scanned(0), sites=loop_of_layers(0)),
    Row(name="scan in the middle", make=scanned(1), sites=loop_of_layers(1)),
    Row(name="scan of remat", make=scanned(0, nn.remat(Layer)), sites=loop_of_layers(0)),
    # All heads see the same rows: the product that JAX makes of that has heads times channels.
    Row(name="vmap first", make=vmapped(0), sites={"heads/kernel#dot": (KEPT, SUM, KEPT)}),
    Row(name="vmap middle", make=vmapped(1), sites={"heads/kernel#dot": (SUM, KEPT, KEPT)}),
    Row(
        name="remat",
        make=linen(remat),
        sites={"layer/up/kernel#dot": MATRIX, "layer/down/kernel#dot": MATRIX},
    ),
    Row(name="tied", make=linen(tied), sites={**TIED, "up/kernel#dot": MATRIX}, args=IDS),
    Row(name="weight first", make=linen(weight_first), sites={"w#dot": (KEPT, KEPT, SUM)}),
    Row(
        name="three operands",
        make=linen(three_operands),
        sites={"up#dot": MATRIX, "down#dot": MATRIX},
    ),
    Row(name="bilinear", make=linen(bilinear), sites={"w#dot": (SUM, KEPT, KEPT)}),
    Row(
        name="two contracted axes",
        make=linen(two_contracted),
        sites={"join/kernel#dot": (SUM, SUM, KEPT)},
    ),
    Row(name="attention", make=linen(attention), sites=HEADS, args=(ROWS,)),
    Row(
        name="fused and split",
        make=linen(fused_and_split),
        sites={"qkv#dot": MATRIX, "qkv#dot.1": MATRIX, "qkv#dot.2": MATRIX},
    ),
    Row(
        name="fused and sliced by rows",
        make=linen(fused_and_sliced_rows),
        sites={"w#dot": MATRIX, "w#dot.1": MATRIX},
    ),
    Row(name="joined", make=linen(joined), sites=QKV),
    Row(name="stacked", make=linen(stacked), sites=QKV),
    Row(name="shard_map", make=linen(sharded_body), sites={"w#dot": MATRIX}),
    Row(
        name="NNX inside",
        make=linen(nnx_inside),
        sites={"up/kernel#dot": MATRIX, "inner/kernel#dot": MATRIX},
    ),
)
NNX_LAYERS = {"layers/linear/kernel#dot": (STACK, SUM, KEPT)}
ROWS_OF_NNX = (
    Row(name="nnx scan", make=own(NNXScanned), sites=NNX_LAYERS),
    Row(name="nnx scan of remat", make=own(NNXScanned, remat=True), sites=NNX_LAYERS),
    Row(
        name="nnx vmap",
        make=own(NNXVmapped),
        sites={"layers/linear/kernel#dot": (BATCH, SUM, KEPT)},
        args=(jnp.cos(jnp.arange(3.0 * 4 * D)).reshape(3, 4, D),),
    ),
    Row(name="nnx remat", make=own(NNXRemat), sites={"layer/linear/kernel#dot": MATRIX}),
    Row(name="nnx tied", make=own(NNXTied), sites=TIED, args=IDS),
    Row(
        name="nnx joined",
        make=own(NNXJoined),
        sites={f"{n}/kernel#dot": MATRIX for n in "qkv"},
    ),
    Row(
        name="Linen inside",
        make=own(LinenInside),
        sites={"up/kernel#dot": MATRIX, "inner/kernel#dot": MATRIX},
    ),
    Row(name="nnx attention", make=own(NNXAttention), sites=HEADS, args=(ROWS,)),
)
