"""The model: jaxquant's Llama, and for BitNet the same with two more norms in each block."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxquant.models import Llama, LlamaConfig
from jaxquant.models._llama import RMSNorm

from .settings import Model


class Normed(nnx.Module):
    """`linear(norm(x))`."""

    def __init__(self, linear: nnx.Linear, width: int, epsilon: float):
        self.norm = RMSNorm(width, epsilon=epsilon, param_dtype=jnp.float32)
        self.linear = linear

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.norm(x))


def config_of(settings: Model, vocabulary: int, length: int) -> LlamaConfig:
    """Logits are tied to the embedding, which is large beside so small a model."""
    return LlamaConfig(
        vocab_size=vocabulary,
        width=settings.width,
        hidden=settings.hidden,
        layers=settings.layers,
        heads=settings.heads,
        kv_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        rope_theta=settings.rope_theta,
        norm_epsilon=settings.norm_epsilon,
        max_length=length,
        tied=True,
    )


def make_model(config: LlamaConfig, *, sub_norms: bool, seed: int) -> Llama:
    """A model in float32 with random weights.

    With `sub_norms` every linear of a block has a norm right before it, as BitNet b1.58 wants it
    (SubLN): q, k, v, gate and up have those of the Llama, `o` and `down` get their own.
    """
    model = Llama(config, rngs=nnx.Rngs(seed))
    for block in model.layers if sub_norms else ():
        heads = config.heads * config.head_dim
        block.attention.o = Normed(block.attention.o, heads, config.norm_epsilon)
        block.mlp.down = Normed(block.mlp.down, config.hidden, config.norm_epsilon)
    return model


def save_variables(path: Any, variables: Any) -> None:
    """The float parameters by path, in float32."""
    flat = nnx.to_flat_state(variables)
    save_file({_name(keys): np.asarray(v.get_value()) for keys, v in flat}, path)


def load_variables(path: Any, model: nnx.Module) -> Any:
    """What `save_variables` wrote, as the state of `model`.

    **Raises:** `ValueError` if the file is of another model.
    """
    state, held = nnx.state(model), load_file(path)
    flat = dict(nnx.to_flat_state(state))
    wanted = {_name(keys): v.get_value().shape for keys, v in flat.items()}
    found = {name: x.shape for name, x in held.items()}
    if wanted != found:
        odd = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{path} is of another model: {odd[0]} is {found.get(odd[0])} there and "
            f"{wanted.get(odd[0])} here. Train it again, in another folder."
        )
    return nnx.from_flat_state(
        {keys: v.replace(jnp.asarray(held[_name(keys)])) for keys, v in flat.items()}
    )


def _name(keys: Any) -> str:
    return ".".join(map(str, keys))
