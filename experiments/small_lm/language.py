"""The problem of a run: next tokens, by a float model or by one that computes in few bits."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32
from training_loop import as_data, FSDP, make_mesh, placed, Problem, TokenWindows

import jaxquant as jq
from jaxquant.intercept import check_learned

from .model import config_of, load_variables, make_model
from .settings import Named, Shared
from .text import Corpus

Call = Callable[[Any, Int32[Array, "batch length"]], Float[Array, "batch length vocab"]]
WEIGHTS = "model.safetensors"
"""What a run leaves in its folder: its float weights."""


def token_nll(
    logits: Float[Array, "batch length vocab"], tokens: Int32[Array, "batch length"]
) -> Float[Array, "batch predicted"]:
    """`-log p` of each token but the first."""
    log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]


def divergence(
    teacher: Float[Array, "batch length vocab"], logits: Float[Array, "batch length vocab"]
) -> Float[Array, "batch predicted"]:
    """`KL(teacher || model)` at each position that predicts a token."""
    theirs = jax.nn.log_softmax(teacher[:, :-1].astype(jnp.float32))
    ours = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """The model of a run: `call(variables, tokens)` computes as it is trained.

    `variables` are those of the first step, `plan` is `None` for a float run.
    """

    model: nnx.Module
    plan: jq.Plan | None
    variables: Any
    call: Call

    def converted(self, variables: Any) -> tuple[Callable[[Any], Any], Any]:
        """The model as it will be used, and its variables: quantized ones of a run with a plan."""
        if self.plan is None:
            return nnx.merge(nnx.graphdef(self.model), variables), variables
        qvariables = jq.convert(variables, self.plan)
        return jq.wrap(self.model, self.plan, jq.prepare(qvariables, self.plan)), qvariables


def make_subject(named: Named, shared: Shared, corpus: Corpus, runs: Path) -> Subject:
    """The model of a run as it starts; `runs` holds the folders of those that it needs."""
    run = named.run
    config = config_of(shared.model, corpus.tokenizer.vocab_size, shared.text.length)
    model = make_model(config, sub_norms=run.sub_norms, seed=run.loop.seed)
    variables = nnx.state(model)
    if run.start is not None:
        variables = load_variables(runs / run.start / WEIGHTS, model)
    if run.recipe is None:
        graph = nnx.graphdef(model)
        return Subject(
            model=model, plan=None, variables=variables,
            call=lambda variables, tokens: nnx.merge(graph, variables)(tokens),
        )  # fmt: skip
    example = jnp.zeros((1, shared.text.length), jnp.int32)
    recipe = jq.recipes.load(named.folder / run.recipe)
    # Where the loop will lay parameters: of those that are cut, codes are what devices exchange.
    places = placed(variables, make_mesh(run.devices))
    plan = jq.plan(model, variables, example, recipe=recipe, sharding=places)
    gather = FSDP if run.devices.fsdp > 1 else ()
    batches = [(jnp.asarray(windows(named, shared, corpus)(0)),)]
    tvariables = jq.start_training(model, variables, plan, batches)
    simulated = jq.simulate(model, plan, tvariables, gather=gather)
    return Subject(model=model, plan=plan, variables=tvariables, call=simulated.apply)


def windows(named: Named, shared: Shared, corpus: Corpus) -> TokenWindows:
    """The examples of each step: the same for all runs of a seed and a batch."""
    loop = named.run.loop
    return TokenWindows(
        tokens=corpus.train, length=shared.text.length, batch=loop.batch, seed=loop.seed
    )


def make_problem(
    named: Named, shared: Shared, corpus: Corpus, subject: Subject, runs: Path
) -> Problem:
    """What the loop trains."""
    run, call = named.run, subject.call
    fixed: Any = ()
    weight, teach = 0.0, call
    if run.distillation is not None:
        weight = run.distillation.weight
        config = config_of(shared.model, corpus.tokenizer.vocab_size, shared.text.length)
        teacher = make_model(config, sub_norms=False, seed=0)
        fixed = load_variables(runs / run.distillation.teacher / WEIGHTS, teacher)
        graph = nnx.graphdef(teacher)

        def teach(variables: Any, tokens: Any) -> Any:
            return nnx.merge(graph, variables)(tokens)

    def loss(variables: Any, carried: Any, tokens: Any, fixed: Any, key: Any) -> Any:
        logits = call(variables, tokens)
        found = (1 - weight) * token_nll(logits, tokens).mean()
        if weight:
            found += weight * divergence(teach(fixed, tokens), logits).mean()
        return found, carried

    scored = jax.jit(lambda variables, tokens: token_nll(call(variables, tokens), tokens).mean(1))

    def evaluate(variables: Any, carried: Any) -> dict[str, float]:
        found = [scored(variables, jnp.asarray(part)) for part in parts(corpus.held_out)]
        return {"held_out": float(np.concatenate(found).mean(dtype=np.float64))}

    identity = {
        "model": as_data(shared.model) | {"sub_norms": run.sub_norms},
        "corpus": corpus.identity,
        "recipe": None if subject.plan is None else subject.plan.fingerprint,
        "start": run.start,
        "distillation": as_data(run.distillation),
    }
    return Problem(
        loss=loss,
        variables=subject.variables,
        fixed=fixed,
        batch=windows(named, shared, corpus),
        evaluate=evaluate,
        check=lambda variables: None if subject.plan is None else check_learned(variables),
        labels=None if subject.plan is None else jq.training_labels,
        identity=identity,
    )


def parts(held_out: np.ndarray, size: int = 8) -> list[np.ndarray]:
    """Windows in equal batches."""
    whole = len(held_out) // size * size
    return np.split(held_out[:whole], whole // size) if whole else [held_out]
