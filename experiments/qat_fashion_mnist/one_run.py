"""One model, by one method, at so many bits, from one seed: trained, converted, scored."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fashion_mnist import Data
from flax import serialization, traverse_util
from learning import initial, trained
from networks import NETWORKS
from recipes import recipe
from settings import FIXED, FLOAT, LSQ, PTQ, Settings, TUNED

import jaxquant as jq
from jaxquant.models import variables_inventory

SCORED = 500  # Images at a time; a divisor of all test sets.


def run(
    model: str,
    bits: int,
    method: str,
    seed: int,
    size: Settings,
    train: Data,
    test: Data,
    weights: pathlib.Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The row of one run. All but `float32` start from that run's `weights`."""
    start = time.perf_counter()
    network = NETWORKS[model]
    file = weights / f"{model}_{seed}.npz"
    options: dict[str, Any] = {
        "batch": size.batch,
        "learned_rate": size.learned_rate,
        "say": say,
    }
    row: dict[str, Any] = {"model": model, "bits": bits, "method": method, "seed": seed}
    if method == FLOAT:
        variables = initial(network, seed)
        variables, told = trained(
            network.apply, variables, train, size.first[model], seed=seed, **options
        )
        write(file, variables)
        row |= told | {"accuracy": accuracy(network.apply, variables, test)}
        row |= {"parameters": sum(x.size for x in jax.tree.leaves(variables["params"]))}
        return row | {"bits_per_weight": 32.0, "total_seconds": time.perf_counter() - start}
    variables = read(file, initial(network, seed))
    # Other batches than the float model's, the same ones for all that are compared.
    options["seed"] = 1000 + seed
    if method == TUNED:
        variables, told = trained(network.apply, variables, train, size.tuned[model], **options)
        row |= told | {"accuracy": accuracy(network.apply, variables, test)}
        return row | {"bits_per_weight": 32.0, "total_seconds": time.perf_counter() - start}
    images = jnp.asarray(train.images[: size.calibration])
    plan = jq.plan(network, variables, images[:2], recipe=recipe(model, bits, method))
    wrapped = jq.wrap(network, plan).apply
    if method == PTQ:
        qvariables = jq.calibrate(network, variables, [(images,)], plan).qvariables
        row["accuracy"] = accuracy(wrapped, qvariables, test)
    else:
        tvariables = started(network, variables, plan, images, model, bits, method)
        tmodel = jq.simulate(network, plan)
        tvariables, told = trained(tmodel.apply, tvariables, train, size.tuned[model], **options)
        row |= told
        qvariables = jq.convert(tvariables, plan)
        row |= compared(tmodel.apply, tvariables, wrapped, qvariables, test)
    row["bits_per_weight"] = variables_inventory(qvariables).bits_per_weight
    return row | {"total_seconds": time.perf_counter() - start}


def started(
    network: Any, variables: Any, plan: Any, images: Any, model: str, bits: int, method: str
) -> Any:
    """Variables to train: learned scales from the first batch, or fixed ones from calibration."""
    if method != FIXED:
        batches = [(images,)] if method == LSQ else ()
        return jq.start_training(network, variables, plan, batches)
    rounding = jq.plan(network, variables, images[:2], recipe=recipe(model, bits, PTQ))
    calibrated = jq.calibrate(network, variables, [(images,)], rounding).qvariables
    return jq.start_training(network, variables, plan, calibrated=calibrated)


def logits_of(apply: Any, variables: Any, data: Data) -> np.ndarray:
    compiled = jax.jit(apply)
    parts = [
        compiled(variables, jnp.asarray(data.images[at : at + SCORED]))
        for at in range(0, len(data.labels), SCORED)
    ]
    return np.concatenate([np.asarray(part) for part in parts])


def accuracy(apply: Any, variables: Any, data: Data) -> float:
    """Percent of the images that are classified right."""
    return right(logits_of(apply, variables, data), data)


def right(logits: np.ndarray, data: Data) -> float:
    return float(100 * np.mean(logits.argmax(1) == data.labels))


def compared(
    simulated: Any, tvariables: Any, wrapped: Any, qvariables: Any, data: Data
) -> dict[str, Any]:
    """What was converted, beside what was trained, on every test image."""
    before, after = (
        logits_of(apply, held, data)
        for apply, held in ((simulated, tvariables), (wrapped, qvariables))
    )
    return {
        "accuracy": right(after, data),
        "flipped": int((before.argmax(1) != after.argmax(1)).sum()),
        "equal_images": int((before == after).all(axis=1).sum()),
        "largest_difference": float(np.abs(before - after).max()),
        "largest_logit": float(np.abs(before).max()),
    }


def write(file: pathlib.Path, variables: Any) -> None:
    """A float model, whole or not at all."""
    flat = traverse_util.flatten_dict(serialization.to_state_dict(variables), sep="/")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part.npz")
    np.savez(part, **{name: np.asarray(array) for name, array in flat.items()})
    part.rename(file)


def read(file: pathlib.Path, like: Any) -> Any:
    with np.load(file) as held:
        flat = {tuple(name.split("/")): jnp.asarray(held[name]) for name in held.files}
    return serialization.from_state_dict(like, traverse_util.unflatten_dict(flat))
