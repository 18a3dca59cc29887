"""The rows of the table: what is done to the linear layers of SmolLM2."""

import dataclasses

import jaxquant as jq
from jaxquant.algorithms import GPTQ, Order, RangeSearch

from .settings import CONFIGS

EMBEDDING = jq.Rule(match="*embed*")
"""Left as it is, and with it the logits, which are tied to it."""
W4 = jq.Scheme(values=jq.INT4, tile=jq.PER_CHANNEL)
A8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
"""A scale a token."""
W2 = jq.Scheme(
    values=jq.formats.UINT2,
    tile=jq.Tile(contracted=64),
    scale=jq.BFLOAT16,
    range=jq.MinMax(),
    zero_point=jq.formats.UINT2,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """A row without training: `recipe`, by rounding or by calibration. `None`: the float model."""

    what: str
    recipe: jq.Recipe | None


def _recipe(name: str, **options: object) -> jq.Recipe:
    rule = jq.Rule(match="*", **options)  # type: ignore[arg-type]
    return jq.Recipe(name=name, rules=(EMBEDDING, rule))


def _least_error(scheme: jq.Scheme) -> jq.Scheme:
    base = scheme.range
    assert isinstance(base, jq.AbsMax | jq.MinMax)
    return dataclasses.replace(scheme, range=jq.ranges.MeanSquaredError(base=base))


# As `channel_gptq` of experiments/ptq_smollm2 has it.
_GPTQ = GPTQ(order=Order.STATIC, damping=0.1, search=RangeSearch())

MADE = {
    "float32": Made(what="float32", recipe=None),
    "w4a8_round": Made(
        what="W4 per channel, A8 a token, rounding",
        recipe=_recipe("w4a8_round", weights=W4, activations=A8),
    ),
    "w4a8_mse": Made(
        what="the same, ranges of least error",
        recipe=_recipe("w4a8_mse", weights=_least_error(W4), activations=A8),
    ),
    "w4a8_gptq": Made(
        what="the same, GPTQ, damping 0.1, range search",
        recipe=_recipe("w4a8_gptq", weights=W4, activations=A8, algorithm=_GPTQ),
    ),
    "w2_round": Made(what="W2 asym g64, rounding", recipe=_recipe("w2_round", weights=W2)),
    "w2_mse": Made(
        what="the same, ranges of least error",
        recipe=_recipe("w2_mse", weights=_least_error(W2)),
    ),
    "w2_gptq": Made(
        what="W2 asym g64, gptq_w2_asym_g64",
        recipe=jq.recipes.load(CONFIGS.parents[1] / "gptq_w2_asym_g64.toml"),
    ),
}
TRAINED = ("w4a8_qat", "w2_qat", "w2_qat_gptq", "full", "qlora")
"""Files of `CONFIGS`."""
ROWS = (*MADE, *TRAINED)
FULL = tuple(name for name in ROWS if name != "w2_qat_gptq")
"""What is made unless `--rows` chooses."""
QUICK = ("w2_round", "w2_qat", "qlora")
"""Also `w4a8_qat` has settings for it: `--quick --rows w4a8_round w4a8_qat`."""

_LEFT = tuple(jq.Rule(match=match) for match in ("layers/[3-9]/*", "layers/[12]?/*"))


def cut(recipe: jq.Recipe) -> jq.Recipe:
    """The recipe with 3 of the 30 layers quantized, and the rest left as they are."""
    return dataclasses.replace(recipe, rules=(*_LEFT, *recipe.rules))
