"""Claim 2: weight-only models against the plain model on the weights that the codes stand for."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import float64_llama
import jax
import jax.numpy as jnp
import numpy as np
from smollm2 import by_path, plain_call, Quantized, Subject

import jaxquant as jq

FLOAT32_LIMIT = 1e-4
"""Largest |logit difference| over largest |logit|."""
BFLOAT16_LIMIT = 1.5
"""Distance from float64, over that of the plain bfloat16 model."""
STEPS = 16
"""Tokens decoded one by one after a prompt. In bfloat16 a single one says little: either model may
be three times nearer to float64 than the other."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """A model as a pure function, and its variables."""

    call: Any
    variables: Any


def sides(model: Any, quantized: Quantized) -> tuple[Side, dict[str, Side]]:
    """The plain model on dequantized weights, and the quantized one in each layout."""
    plan = quantized.plan
    layouts = {"canonical": quantized.canonical, "prepared": quantized.prepared}
    if any(site.weights and site.weights.values == jq.INT4 for site in plan.sites):
        packed = jq.prepare(quantized.canonical, plan, backend="xla_cpu", packed=True)
        layouts["packed"] = packed
    wrapped = jq.wrap(model, plan, quantized.canonical)
    call = jax.jit(wrapped.apply, static_argnames=("method",))
    plain = jax.jit(plain_call(model), static_argnames=("method",))
    return (
        Side(call=plain, variables=quantized.dequantized),
        {name: Side(call=call, variables=variables) for name, variables in layouts.items()},
    )


def prompt_logits(side: Side, tokens: np.ndarray) -> np.ndarray:
    """`[length, vocab]` of a prompt at once."""
    return np.asarray(side.call(side.variables, jnp.asarray(tokens[None])))[0].astype(np.float64)


def decoded_logits(plain: Side, others: Mapping[str, Side], cache: Any, tokens: np.ndarray) -> Any:
    """`[STEPS, vocab]` for each side, "plain" included, of the last tokens one by one.

    All sides step from the plain model's cache, so that what is compared is one step.
    """
    before = len(tokens) - STEPS
    _, cache = plain.call(
        plain.variables, jnp.asarray(tokens[None, :before]), cache, method="decode"
    )
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("plain", *others)}
    for token in tokens[before:]:
        ids = jnp.asarray([[token]])
        for name, side in others.items():
            logits, _ = side.call(side.variables, ids, cache, method="decode")
            found[name].append(np.asarray(logits)[0, 0].astype(np.float64))
        logits, cache = plain.call(plain.variables, ids, cache, method="decode")
        found["plain"].append(np.asarray(logits)[0, 0].astype(np.float64))
    return {name: np.stack(rows) for name, rows in found.items()}


def _logits(
    plain: Side,
    others: Mapping[str, Side],
    model: Any,
    tokens: np.ndarray,
    lengths: list[int],
    decode: bool,
) -> Iterator[tuple[str, int, dict[str, np.ndarray]]]:
    """What is measured, the position of its first logits, and the logits of each side."""
    for length in lengths:
        found = {name: prompt_logits(side, tokens[:length]) for name, side in others.items()}
        found["plain"] = prompt_logits(plain, tokens[:length])
        yield f"{length} tokens at once", 0, found
    if not decode:
        return
    length = min(lengths)
    cache = model.init_cache(1, length)
    found = decoded_logits(plain, others, cache, tokens[:length])
    yield f"{STEPS} tokens one by one", length - STEPS, found


def float32_errors(
    recipe: str, subject: Subject, quantized: Quantized, lengths: list[int], *, decode: bool = True
) -> Iterator[dict[str, Any]]:
    """Differences from the plain float32 model."""
    plain, others = sides(subject.model, quantized)
    for what, _, found in _logits(plain, others, subject.model, subject.tokens[0], lengths, decode):
        want = found.pop("plain")
        for layout, got in found.items():
            error = float(np.abs(got - want).max() / np.abs(want).max())
            yield {
                "recipe": recipe,
                "layout": layout,
                "what": what,
                "largest_logit": float(np.abs(want).max()),
                "worst": error,
                "limit": FLOAT32_LIMIT,
                "holds": error <= FLOAT32_LIMIT,
            }


def bfloat16_errors(
    recipe: str, subject: Subject, quantized: Quantized, lengths: list[int], *, decode: bool = True
) -> Iterator[dict[str, Any]]:
    """Distances of the bfloat16 models from float64, largest and root mean square."""
    model, tokens = subject.in_dtype(jnp.bfloat16), subject.tokens[0]
    plain, others = sides(model, quantized)
    weights = by_path(quantized.dequantized)
    exact = float64_llama.logits(weights, subject.config, tokens[: max(lengths)])
    for what, first, found in _logits(plain, others, model, tokens, lengths, decode):
        want = exact[first : first + len(found["plain"])]
        largest, rms = _distances(found.pop("plain"), want)
        for layout, got in found.items():
            ours = _distances(got, want)
            ratios = ours[0] / largest, ours[1] / rms
            yield {
                "recipe": recipe,
                "layout": layout,
                "what": what,
                "plain_max": largest,
                "plain_rms": rms,
                "ratio_max": ratios[0],
                "ratio_rms": ratios[1],
                "worst": max(ratios),
                "limit": BFLOAT16_LIMIT,
                "holds": max(ratios) <= BFLOAT16_LIMIT,
            }


def _distances(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    difference = got - want
    return float(np.abs(difference).max()), float(np.sqrt(np.mean(difference**2)))


def reference_error(subject: Subject, length: int) -> float:
    """How far the package's float32 model is from the float64 reference, of the largest logit.

    Small, or the reference is of another model and says nothing about bfloat16.
    """
    side = Side(call=jax.jit(plain_call(subject.model)), variables=subject.variables)
    tokens = subject.tokens[0][:length]
    exact = float64_llama.logits(by_path(subject.variables), subject.config, tokens)
    return float(np.abs(prompt_logits(side, tokens) - exact).max() / np.abs(exact).max())
