"""Claim 3: models that round activations, run eagerly, compiled, and over four devices.

A difference in the last bit of one activation may move it across the border between two codes, and
then grows by rounding itself (`flipped_codes.py`). So runs agree either to the bit, or no better
than two runs of one program whose embedding differs by one ulp: that run is measured beside them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flipped_codes import one_ulp_off
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from smollm2 import is_qarray, plain_call, Quantized, Subject

import jaxquant as jq
from jaxquant.intercept import map_leaves
from jaxquant.qarray import place

DEVICES = 4
LIMIT = 1e-3
"""KL divergence in nats a token, mean over tokens, between the compiled run and any other."""
# Devices for the batch, and for the weights.
CUTS = {
    "weights over 4 devices": (1, 4),
    "batch over 4 devices": (4, 1),
    "batch over 2, weights over 2": (2, 2),
}
FLOOR = "jit, embedding one ulp off"
# Columns of the layers that read the stream, rows of those that write to it (Shoeybi et al. 2019).
COLUMNS = ("q/kernel", "k/kernel", "v/kernel", "gate/kernel", "up/kernel")
ROWS = ("o/kernel", "down/kernel")


def mesh_of(data: int, model: int) -> Mesh:
    """Devices by (batch, weights)."""
    devices = np.array(jax.devices()[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def placed(qvariables: Any, mesh: Mesh) -> Any:
    """The variables with columns and rows of the linear layers over the axis `model`."""

    def one(path: str | None, leaf: Any) -> Any:
        spec = PartitionSpec()
        if path is not None and path.endswith(COLUMNS):
            spec = PartitionSpec(None, "model")
        elif path is not None and path.endswith(ROWS):
            spec = PartitionSpec("model", None)
        sharding = NamedSharding(mesh, spec)
        return place(leaf, sharding) if is_qarray(leaf) else jax.device_put(leaf, sharding)

    return map_leaves(one, qvariables)


def runs(
    subject: Subject, quantized: Quantized, tokens: np.ndarray, cuts: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Each way of running the model, by name, and its logits."""
    wrapped = jq.wrap(subject.model, quantized.plan, quantized.prepared)
    call = jax.jit(wrapped.apply)
    ids = jnp.asarray(tokens)
    yield "jit", call(quantized.prepared, ids)
    yield "jit, canonical layout", call(quantized.canonical, ids)
    yield "eager", wrapped.apply(quantized.prepared, ids)
    for name in cuts:
        mesh = mesh_of(*CUTS[name])
        cut = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data", None)))
        yield name, call(placed(quantized.prepared, mesh), cut)
    yield FLOOR, call(one_ulp_off(quantized.prepared), ids)


def divergences(
    recipe: str,
    subject: Subject,
    quantized: Quantized,
    length: int,
    cuts: Sequence[str] = tuple(CUTS),
) -> Iterator[dict[str, Any]]:
    """For each run, its divergence from the compiled one and from the float model."""
    tokens = subject.tokens[:DEVICES, :length]
    plain = jax.jit(plain_call(subject.model))(subject.variables, jnp.asarray(tokens))
    log_plain = _log_softmax(np.asarray(plain))
    found: dict[str, np.ndarray] = {}
    for name, logits in runs(subject, quantized, tokens, cuts):
        found[name] = _log_softmax(np.asarray(logits))
        worst = max(_divergence(found["jit"], found[name]), _divergence(found[name], found["jit"]))
        yield {
            "recipe": recipe,
            "run": f"{subject.config.layers}-block model, {name}",
            "tokens": int(tokens.size),
            "worst": worst,
            # What the run says of its recipe, as every table of the project has it.
            "kl_from_plain": _divergence(log_plain, found[name]),
            "equal_probabilities": float((found["jit"] == found[name]).mean()),
            **({} if name == FLOOR else {"limit": LIMIT, "holds": worst < LIMIT}),
        }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def _divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p || q), mean over rows."""
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())
