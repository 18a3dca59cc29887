"""Greedy completion with a cache."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def generate(
    model: Any,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    stop_ids: Collection[int] = (),
) -> list[int]:
    """The most likely continuation of `prompt_ids`, token by token; the ids that are new.

    `model` has `prefill(tokens, length)` and `decode(tokens, cache, last_only=)`, as `Llama` and
    whatever wraps one.

    Ends after `max_new_tokens`, or with the first of `stop_ids`, which is not returned. Equal
    logits give the lower id. A model that is a pytree (as NNX modules are) is compiled here, one
    program for the prompt and one for each further token; another object is called as it is and
    may compile inside.

    Raises:
      ValueError: the prompt is empty or `max_new_tokens` is below 1.
    """
    if not prompt_ids:
        raise ValueError(
            "The prompt has no tokens, and at least one is wanted. Begin with the tokenizer's "
            "bos_id."
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, and at least 1 is wanted.")
    opaque = jax.tree_util.all_leaves([model])
    start, step = (_start, _step) if opaque else (_compiled_start, _compiled_step)
    prompt = jnp.asarray([list(prompt_ids)], jnp.int32)
    tokens, cache = start(model, prompt, len(prompt_ids) + max_new_tokens)
    new: list[int] = []
    while (token := int(tokens[0, 0])) not in stop_ids:
        new.append(token)
        if len(new) == max_new_tokens:
            break
        tokens, cache = step(model, tokens, cache)
    return new


def _start(
    model: Any, prompt: Int32[Array, "batch prompt"], length: int
) -> tuple[Int32[Array, "batch one"], Any]:
    logits, cache = model.prefill(prompt, length)
    return _likeliest(logits), cache


def _step(
    model: Any, tokens: Int32[Array, "batch new"], cache: Any
) -> tuple[Int32[Array, "batch one"], Any]:
    logits, cache = model.decode(tokens, cache, last_only=True)
    return _likeliest(logits), cache


def _likeliest(logits: Float[Array, "batch one vocab"]) -> Int32[Array, "batch one"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


_compiled_start = jax.jit(_start, static_argnums=(2,))
# The old cache is never read again, so the new one may take its memory.
_compiled_step = jax.jit(_step, donate_argnames=("cache",))
