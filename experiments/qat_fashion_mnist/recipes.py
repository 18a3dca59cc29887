"""How each method holds weights and activations at so many bits.

As in the LSQ paper: weights signed, activations after a ReLU not, first and last layer in 8 bits.
Weights have a scale for each output channel (the paper: one a layer), activations one a layer.
"""

import settings

import jaxquant as jq
from jaxquant.training import LSQ, StraightThrough, Training

# What reads something that may be negative: the transformer's norms, and its attention's sums.
SIGNED = {"cnn": (), "vit": ("*/attention/*", "*/up/*")}
# Ranges that err least: of activations from calibration, of weights searched for.
ACTIVATIONS = jq.ranges.MeanSquaredError(base=jq.AbsMax(), power=2.0)
WEIGHTS = jq.ranges.MeanSquaredError(base=jq.AbsMax(), power=2.0, grid=25)

# Method -> range of weights, range of activations, whether that is fixed before, estimator.
#
# Plain straight-through takes its ranges anew in every step: the peak of each channel of a weight,
# and that of what the batch brings. `ste_fixed` is what it can be at best: clipped, its activations
# in the ranges that calibration found, its weights in those that err least, in every step anew.
HOW = {
    settings.LSQ: (jq.AbsMax(), jq.AbsMax(), True, LSQ()),
    settings.STE: (jq.AbsMax(), jq.AbsMax(), False, StraightThrough()),
    settings.FIXED: (WEIGHTS, ACTIVATIONS, True, StraightThrough(clipped=True)),
    settings.PTQ: (WEIGHTS, ACTIVATIONS, True, None),
}


def formats(bits: int, signed: bool) -> tuple[jq.Format, jq.Format]:
    """Of weights and of activations.

    8-bit activations are signed everywhere: integer units multiply int8 with int8, and 7 bits and
    no sign are what that leaves.
    """
    weights = getattr(jq.formats, f"INT{bits}")
    unsigned = bits < 8 and not signed
    return weights, getattr(jq.formats, f"UINT{bits}") if unsigned else weights


def rule(match: str, bits: int, method: str, signed: bool) -> jq.Rule:
    """One rule for weights and activations."""
    of_weights, of_activations, static, estimator = HOW[method]
    weights, activations = formats(bits, signed)
    training = None if estimator is None else Training(weights=estimator, activations=estimator)
    return jq.Rule(
        match=match,
        weights=jq.Scheme(values=weights, tile=jq.PER_CHANNEL, range=of_weights),
        activations=jq.Scheme(values=activations, tile=jq.PER_TENSOR, range=of_activations),
        static=static,
        training=training,
    )


def recipe(model: str, bits: int, method: str) -> jq.Recipe:
    """Rules for every layer of a model."""
    ends = [rule(match, settings.ENDS, method, True) for match in ("stem/*", "head/*")]
    signed = [rule(match, bits, method, True) for match in SIGNED[model]]
    rules = (*ends, *signed, rule("*", bits, method, False))
    return jq.Recipe(name=f"{method}_{bits}", rules=rules)
