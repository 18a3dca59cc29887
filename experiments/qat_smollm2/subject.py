"""What a run trains: the model in few bits, its variables, its loss, the tokens of each step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from small_lm.language import divergence, token_nll
from training_loop import as_data, Order, Problem

import jaxquant as jq
from jaxquant.checkpoint import materialize
from jaxquant.cli._quantize import plan_for
from jaxquant.intercept import check_learned
from jaxquant.models import OpenedModel

from .settings import Named, Run

MONITORED = 2
"""Windows at the end of the training text that no step sees: the loss on them is written down."""
ADAPTERS = "jaxquant/*"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """`call(trained, fixed, tokens)` computes logits as they are trained.

    `trained` are the variables of the first step, `fixed` those that stay: frozen codes beside
    adapters. `floats` are the model's own variables. `plan` is `None` for a float run.
    """

    opened: OpenedModel
    plan: jq.Plan | None
    floats: Any
    trained: Any
    fixed: Any
    call: Callable[[Any, Any, Any], Any]
    adapters: bool = False

    def converted(self, trained: Any) -> Any:
        """Quantized variables, as they are saved and wrapped.

        **Raises:** `ValueError` for a float run.
        """
        if self.plan is None:
            raise ValueError("A float run has no plan to convert by. Give it a recipe.")
        if self.adapters:
            return jq.combine(trained, self.fixed)
        return jq.convert(trained, self.plan)

    def simulated(self, trained: Any) -> nnx.Module:
        """The model as it is trained, to be scored: tokens to logits."""
        model = self.opened.model
        if self.plan is None:
            return nnx.merge(nnx.graphdef(model), trained)
        if self.adapters:
            return jq.wrap(model, self.plan, jq.combine(trained, self.fixed))
        return jq.simulate(model, self.plan, trained)


def make_subject(named: Named, opened: OpenedModel, started: Any = None) -> Subject:
    """The model of a run as it starts; `started` are quantized variables that it starts from."""
    model, floats = opened.model, materialize(opened.variables)
    graph = nnx.graphdef(model)
    if named.recipe is None:
        return Subject(
            opened=opened, plan=None, floats=floats, trained=floats, fixed=(),
            call=lambda trained, fixed, tokens: nnx.merge(graph, trained)(tokens),
        )  # fmt: skip
    plan = plan_for(opened, named.recipe)
    if named.run.adapters:
        qvariables = jq.quantize(floats, plan)
        key = jax.random.key(named.run.loop.seed)
        trained, fixed = jq.partition(jq.add_adapters(qvariables, plan, key), match=ADAPTERS)
        wrapped = jq.wrap(model, plan, qvariables)
        return Subject(
            opened=opened, plan=plan, floats=floats, trained=trained, fixed=fixed, adapters=True,
            call=lambda trained, fixed, tokens: wrapped.apply(jq.combine(trained, fixed), tokens),
        )  # fmt: skip
    if started is None:
        trained = jq.start_training(model, floats, plan)
    else:
        trained = jq.start_training(model, dequantized(started), plan)
        trained = with_scales_of(trained, started)
    simulated = jq.simulate(model, plan, trained)
    return Subject(
        opened=opened, plan=plan, floats=floats, trained=trained, fixed=(),
        call=lambda trained, fixed, tokens: simulated.apply(trained, tokens),
    )  # fmt: skip


def is_qarray(leaf: Any) -> bool:
    return isinstance(leaf, jq.QArray)


def dequantized(qvariables: Any) -> Any:
    """The float variables that quantized ones stand for."""
    own = nnx.State({name: x for name, x in qvariables.raw_mapping.items() if name != "jaxquant"})
    return jax.tree.map(lambda x: jq.dequantize(x) if is_qarray(x) else x, own, is_leaf=is_qarray)


def with_scales_of(tvariables: Any, qvariables: Any) -> Any:
    """Variables of `start_training` whose learned scales, and offsets, are those of codes.

    Without this they would start by a range rule, which does not find the scale of a tile again if
    its outermost codes are not in use.
    """
    held = {
        "/".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(qvariables)
        if is_qarray(variable.get_value())
    }
    learned = {}
    for path, parts in tvariables.raw_mapping["jaxquant"]["weights"].items():
        q = held[path]
        scale = q.scale.astype(jnp.float32)
        own = {"scale": scale}
        if "offset" in parts:
            own["offset"] = -scale * q.zero_point.astype(jnp.float32)
        learned[path] = {name: parts[name].replace(value) for name, value in own.items()}
    beside = {**tvariables.raw_mapping["jaxquant"], "weights": learned}
    return nnx.State({**tvariables.raw_mapping, "jaxquant": beside})


def make_problem(
    run: Run, subject: Subject, windows: np.ndarray, identity: dict[str, Any]
) -> Problem:
    """What the loop trains, on `windows` `[count, length]` but the last few.

    **Raises:** `ValueError` if there are too few of them.
    """
    if len(windows) <= MONITORED:
        raise ValueError(
            f"{len(windows)} windows to train on, of which {MONITORED} are kept to watch the loss. "
            "Give more text."
        )
    train, monitored = windows[:-MONITORED], jnp.asarray(windows[-MONITORED:], jnp.int32)
    order = Order(count=len(train), batch=run.loop.batch, seed=run.loop.seed)
    graph, share = nnx.graphdef(subject.opened.model), run.distillation
    teacher = subject.floats if share else ()

    def loss(trained: Any, carried: Any, tokens: Any, fixed: Any, key: Any) -> Any:
        codes, floats = fixed
        logits = subject.call(trained, codes, tokens)
        found = (1 - share) * token_nll(logits, tokens).mean()
        if share:
            found += share * divergence(nnx.merge(graph, floats)(tokens), logits).mean()
        return found, carried

    watched = jax.jit(lambda v, fixed: token_nll(subject.call(v, fixed, monitored), monitored))

    def evaluate(trained: Any, carried: Any) -> dict[str, float]:
        return {"monitored": float(watched(trained, subject.fixed).mean())}

    learns = subject.plan is not None and not subject.adapters
    return Problem(
        loss=loss,
        variables=subject.trained,
        fixed=(subject.fixed, teacher),
        batch=lambda step: train[order.at(step)[1]].astype(np.int32),
        evaluate=evaluate,
        check=lambda trained: check_learned(trained) if learns else None,
        labels=jq.training_labels if learns else None,
        identity={
            **identity,
            "plan": None if subject.plan is None else subject.plan.fingerprint,
            "distillation": share,
            "start": run.start,
        },
    )


def settings_of(run: Run) -> dict[str, Any]:
    """A run as plain data, for the table of results."""
    return as_data(run)
