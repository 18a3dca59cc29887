"""How the static recipe was chosen: candidates on calibration text that they did not see.

    python experiments/ptq_smollm2/static_choice.py [--calibration NPZ] [--windows 8] [--length 256]

Never on evaluation text. The second column is of the excerpt that the package carries.
"""

import argparse
import pathlib

import numpy as np
from rows import INT8, recipe, STATIC
from subject import opened, spread

import jaxquant as jq
from jaxquant.algorithms import SmoothQuant
from jaxquant.calibrate import calibrate, token_batches
from jaxquant.checkpoint import materialize
from jaxquant.cli._demo import excerpt
from jaxquant.cli._quantize import plan_for
from jaxquant.evaluate import read_tokens, score, windows_of_text
from jaxquant.models import bind

SINKS = (1, 2, 9, 10, 11, 28)
PERCENTILE = jq.Scheme(
    values=jq.INT8, tile=jq.PER_TENSOR, range=jq.ranges.Percentile(percent=99.999)
)


def candidate(
    dynamic: tuple[int, ...], alpha: float | None = 0.8, scheme: jq.Scheme = STATIC
) -> jq.Recipe:
    """All four kinds of input smoothed; `down` of the layers `dynamic` with a scale a token."""
    scaling = None if alpha is None else SmoothQuant(alpha=alpha)
    left = [
        jq.Rule(
            match=f"layers/{layer}/mlp/down/kernel",
            weights=INT8,
            activations=INT8,
            scaling=scaling,
        )
        for layer in dynamic
    ]
    rest = jq.Rule(match="*", weights=INT8, activations=scheme, scaling=scaling, static=True)
    return recipe("candidate", *left, rest)


EIGHT = (*SINKS, 27, 29)
ELEVEN = (*EIGHT, 6, 13, 17)
CANDIDATES = {
    "0.8, 11 layers": candidate(ELEVEN),
    "0.8, 15 layers": candidate((*ELEVEN, 7, 8, 21, 25)),
    "0.6, 11 layers": candidate(ELEVEN, 0.6),
    "0.8, all layers": candidate(tuple(range(30))),
    "0.8, 8 layers": candidate(EIGHT),
    "0.8, 6 layers": candidate(SINKS),
    "0.8, 8 layers, 99.999%": candidate(EIGHT, scheme=PERCENTILE),
    "not smoothed, 11 layers": candidate(ELEVEN, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=pathlib.Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    model = opened()
    text = windows_of_text(excerpt(), model.tokenizer.encode, given.length)
    whole = text if given.calibration is None else read_tokens(given.calibration)[:, : given.length]
    cut = len(whole) * 3 // 4
    seen = spread(whole[:cut], given.windows)
    held = {"held out": spread(whole[cut:], 4), "excerpt": spread(text[len(text) * 3 // 4 :], 4)}
    variables = materialize(model.variables)
    plain = bind(model.model, variables)
    print(f"| | {' | '.join(held)} |\n|---|---|---|")
    for name, wanted in CANDIDATES.items():
        plan = plan_for(model, wanted)
        batches = token_batches(seen, model.config.vocab_size)
        made = calibrate(model.model, variables, batches, plan)
        quantized = jq.wrap(model.model, plan, jq.prepare(made.qvariables, plan))
        windows = np.concatenate(list(held.values()))
        kl = np.asarray(score(quantized, windows, against=plain).kl_per_window)
        means = [f"{part.mean():.4f}" for part in np.split(kl, [len(held["held out"])])]
        print(f"| {name} | {' | '.join(means)} |", flush=True)


if __name__ == "__main__":
    main()
