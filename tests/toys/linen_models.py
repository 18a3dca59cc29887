"""Small Linen models, a row each for a law: what Flax can do with parameters, state and streams."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

D = 8


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(2 * D)(nn.LayerNorm()(x))
        return x + nn.Dense(D)(nn.gelu(h)), None


class Scanned(nn.Module):
    """Layers stored along `axis` of each parameter."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return layers(name="layers")(x, None)[0]


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.vmap(
            nn.Dense,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=-1,
            axis_size=3,
        )
        return heads(D, name="heads")(x)


class Tied(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, D, name="embed", dtype=self.dtype)
        return embed.attend(nn.Dense(D, dtype=self.dtype, name="up")(embed(ids)))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)
        return nn.LayerNorm()(y)


class Decode(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, decode=True, name="attention")(x)


class SeveralAxes(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.DenseGeneral((2, 4), name="split")(x)
        h = nn.Einsum((2, 4, 3), "...hd,hde->...e", name="einsum")(h)
        w = self.param("raw", nn.initializers.lecun_normal(), (2, 3, 4))
        # A weight on the left, with two contracted axes in another order than the input's.
        left = jnp.einsum("ked,...ke->...d", w, jnp.stack([h, h + 1], axis=-2))
        return nn.DenseGeneral(D, axis=(-2, -1), name="join")(jnp.stack([left, left], axis=-1))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(D)(x))
        return nn.Dense(D)(nn.relu(x))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(D)(x))
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(D)(x))


class Sown(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(D)(x)
        self.sow("intermediates", "hidden", x)
        self.sow("intermediates", "hidden", x + 1)
        return nn.Dense(D)(x)


class InSetup(nn.Module):
    """Parameters and submodules made in `setup`, where something is computed too."""

    def setup(self):
        self.w = self.param("w", nn.initializers.lecun_normal(), (D, D))
        self.shift = self.param("shift", nn.initializers.zeros, (1, D)) + 1.0
        self.up = nn.Dense(D)
        self.down = nn.Dense(D)

    def __call__(self, x):
        return self.encode(x) @ self.w

    def encode(self, x):
        return self.down(nn.relu(self.up(x))) + self.shift


class TwoUses(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (D, D))
        return w.T @ (x @ w).T


class Crossed(nn.Module):
    """Two uses of one weight that sum over different axes."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (D, D))
        return (w @ (x @ w).T).T


class ManyOutputs(nn.Module):
    @nn.compact
    def __call__(self, x, scale=2.0, flag=None):
        y = nn.Dense(D)(x) * scale
        return {"y": y, "none": None, "text": "hello", "flag": flag, "number": 3, "rows": y.shape}


class Half(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(D, dtype=jnp.bfloat16)(x)
        x = nn.Dense(D, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x)
        return x, nn.Dense(D, dtype=jnp.float32, param_dtype=jnp.bfloat16)(x)


def _x(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(7), shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its arguments, and how `apply` is called."""

    model: nn.Module
    args: tuple[Any, ...] = dataclasses.field(default_factory=lambda: (_x(4, D),))
    options: Callable[[], dict[str, Any]] = dict
    left: tuple[str, ...] = ()
    # What is computed in on the way to the outputs.
    dtype: Any = jnp.float32

    def __str__(self) -> str:
        extra = "-".join(map(str, self.options())) if self.options is not dict else ""
        axis = getattr(self.model, "axis", "")
        return f"{type(self.model).__name__}{axis}{'-' if extra else ''}{extra}"


CASES = (
    Case(model=Scanned()),
    Case(model=Scanned(axis=1)),
    Case(model=Scanned(axis=-1)),
    Case(model=Vmapped()),
    Case(model=Tied(), args=(jnp.array([[1, 2, 10], [0, 5, 1]]),)),
    Case(model=Attention(), args=(_x(2, 3, D),)),
    Case(model=Decode(), args=(_x(2, 1, D),), options=lambda: {"mutable": ["cache"]}),
    Case(model=SeveralAxes()),
    Case(model=Normed()),
    Case(
        model=Normed(),
        options=lambda: {"mutable": ["batch_stats"], "train": True},
    ),
    Case(model=Dropped(), options=lambda: {"rngs": {"dropout": jax.random.key(3)}}),
    Case(model=Sown(), options=lambda: {"mutable": ["intermediates"]}),
    Case(model=Sown(), options=lambda: {"capture_intermediates": True}),
    Case(model=Scanned(), options=lambda: {"capture_intermediates": True, "mutable": ["x"]}),
    Case(model=InSetup()),
    Case(model=InSetup(), options=lambda: {"method": "encode"}, left=("w",)),
    Case(model=InSetup(), options=lambda: {"method": InSetup.encode}, left=("w",)),
    Case(model=TwoUses()),
    Case(model=ManyOutputs(), options=lambda: {"scale": 3.0, "flag": True}),
    Case(model=ManyOutputs(), options=lambda: {"scale": jnp.float32(3)}),
    Case(model=Half(), dtype=jnp.bfloat16),
)
