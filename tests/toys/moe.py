"""A small decoder whose tokens are dealt out to experts, its layers side by side or scanned."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

VOCABULARY, D, HIDDEN, EXPERTS, LAYERS, CHOSEN = 29, 16, 32, 4, 3, 2


class Experts(nn.Module):
    """Each token goes to the `CHOSEN` experts that a router likes best."""

    @nn.compact
    def __call__(self, x):
        tokens = x.reshape(-1, D)
        likes = nn.softmax(nn.Dense(EXPERTS, use_bias=False, name="router")(tokens))
        gates, chosen = lax.top_k(likes, CHOSEN)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS)
        fill = nn.initializers.lecun_normal(batch_axis=0)
        up = self.param("up", fill, (EXPERTS, D, HIDDEN))
        down = self.param("down", fill, (EXPERTS, HIDDEN, D))
        hidden = nn.relu(lax.ragged_dot(tokens[order // CHOSEN], up, sizes))
        rows = lax.ragged_dot(hidden, down, sizes) * gates.reshape(-1)[order][:, None]
        return jnp.zeros_like(tokens).at[order // CHOSEN].add(rows).reshape(x.shape)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        mask = nn.make_causal_mask(x[..., 0])
        attention = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")
        x = x + attention(nn.RMSNorm()(x), mask=mask)
        return x + Experts(name="experts")(nn.RMSNorm()(x)), None


class Decoder(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCABULARY, D, name="embed")
        x = embed(ids)
        if self.scanned:
            stack = nn.scan(
                nn.remat(Layer),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=LAYERS,
            )
            x, _ = stack(name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = Layer(name=f"layer_{i}")(x)
        return embed.attend(nn.RMSNorm()(x))


TOKENS = jnp.asarray([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def unstacked(params):
    """Parameters of the scanned decoder as those of the other one."""
    rest = {name: part for name, part in params.items() if name != "layers"}
    for i in range(LAYERS):
        rest[f"layer_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
    return rest
