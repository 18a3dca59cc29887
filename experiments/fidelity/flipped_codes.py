"""Why claim 3 is hard: how a difference of one ulp becomes a difference of every other code.

An activation that lies within `d` steps of the border between two codes lands on the other side in
a share of about `d` of all cases, and is then off by a whole step. After the product, whose
rounding errors average out, a relative difference of `d` has become one of about `sqrt(d)`: 1e-7,
3e-4, 2e-2, 0.1, and so on up to the size of the rounding errors themselves. Two runs that differ in
one bit are, some roundings later, two independent roundings of the same model.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from smollm2 import Quantized, Subject

import jaxquant as jq
from jaxquant.intercept._evaluate import Evaluator, Use
from jaxquant.intercept._linen import checked, is_codes
from jaxquant.intercept._modes import Infer
from jaxquant.intercept._nnx import nnx_function
from jaxquant.intercept._trace import run
from jaxquant.intercept._variables import leaf_paths


class Recording(Infer):
    """Mode *infer*, which also keeps the codes of the activations of each site; run eagerly."""

    def __init__(self, plan: jq.Plan):
        super().__init__(plan)
        self.codes: dict[str, np.ndarray] = {}

    def compute(self, uses: Sequence[Use], operands: Sequence[Any], eqn: Any) -> Any:
        for use in uses:
            site = self.site_plan(use)
            if site is not None and site.activations is not None:
                contracted, _ = eqn.params["dimension_numbers"]
                other = 1 - use.side
                rounded = jq.quantize_activation(
                    operands[other], site.activations, contracted=contracted[other]
                )
                self.codes[use.site] = np.asarray(rounded.codes)
        return super().compute(uses, operands, eqn)


def recorded(subject: Subject, quantized: Quantized, variables: Any, tokens: Any) -> Any:
    """The codes of the activations at each site, by site."""
    mode = Recording(quantized.plan)
    state = checked(variables, quantized.plan)
    function = nnx_function(subject.model)
    run(function, state, leaf_paths(state), (tokens,), {}, Evaluator(mode), is_codes)
    return mode.codes


def one_ulp_off(variables: Any) -> Any:
    """The variables with each number of the embedding moved by one part in 2^23, up or down."""
    rng = np.random.default_rng(0)
    leaves = []
    for path, leaf in nnx.to_flat_state(variables):
        if path == ("embed", "embedding"):
            x = np.asarray(leaf.get_value())
            signs = rng.choice(np.array([-1, 1], np.float32), x.shape)
            leaf = leaf.replace(jnp.asarray(x * (1 + np.float32(2.0**-23) * signs)))
        leaves.append((path, leaf))
    return nnx.from_flat_state(leaves)


def flipped_codes(
    recipe: str, subject: Subject, quantized: Quantized, length: int
) -> Iterator[dict[str, Any]]:
    """For each layer, the share of codes that an embedding one ulp off changes, by site."""
    tokens = jax.device_put(subject.tokens[:2, :length])
    codes = recorded(subject, quantized, quantized.prepared, tokens)
    moved = recorded(subject, quantized, one_ulp_off(quantized.prepared), tokens)
    layers = range(subject.config.layers)
    shown = sorted({*layers[:6], *layers[::5], *layers[-1:]})
    for layer in shown:
        row: dict[str, Any] = {"recipe": recipe, "what": f"layer {layer}"}
        for name in ("attention/q", "attention/o", "mlp/gate", "mlp/down"):
            site = f"layers/{layer}/{name}/kernel#dot"
            row[name] = float((codes[site] != moved[site]).mean())
        yield row
