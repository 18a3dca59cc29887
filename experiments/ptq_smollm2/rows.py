"""The rows of the table: what each does to the linear layers, as values."""

import dataclasses
import pathlib
from typing import Any

import jaxquant as jq
from jaxquant.algorithms import AWQ, GPTQ, HQQ, Order, RangeSearch, SmoothQuant

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"

SIGNED = jq.AbsMax(convention=jq.Convention.SIGNED)
G64, CHANNEL = jq.Tile(contracted=64), jq.PER_CHANNEL
INT8 = jq.Scheme(values=jq.INT8, tile=CHANNEL)
STATIC = jq.Scheme(values=jq.INT8, tile=jq.PER_TENSOR)


def symmetric(values: jq.Format, tile: jq.Tile = G64) -> jq.Scheme:
    return jq.Scheme(values=values, tile=tile, scale=jq.BFLOAT16, range=SIGNED)


def asymmetric(values: jq.Format, zero_point: jq.Format | None = None) -> jq.Scheme:
    return jq.Scheme(
        values=values,
        tile=G64,
        scale=jq.BFLOAT16 if zero_point is None else zero_point,
        range=jq.MinMax(),
        zero_point=values if zero_point is None else zero_point,
    )


W4, W3 = symmetric(jq.INT4), symmetric(jq.formats.INT3)
CHANNELS = symmetric(jq.INT4, CHANNEL)
A4, A2 = asymmetric(jq.formats.UINT4), asymmetric(jq.formats.UINT2)
# HQQ's zero points lie between codes.
H4, H3 = (asymmetric(v, jq.FLOAT16) for v in (jq.formats.UINT4, jq.formats.UINT3))

MXFP4_CEIL, MXFP4_EVEN = (
    dataclasses.replace(jq.schemes.MXFP4, range=jq.ranges.SharedExponent(rule=rule))
    for rule in (jq.ranges.ExponentRule.CEIL, jq.ranges.ExponentRule.EVEN)
)

SEARCH = RangeSearch()
# As llm-compressor has it: damping of 1%, the range of the group's peak.
USUAL = GPTQ(order=Order.STATIC, damping=0.01)
# What holds on text unlike the calibration's: see the README.
BEST = GPTQ(order=Order.STATIC, damping=0.1, search=SEARCH)
# Schemes whose scales depend on each other have no search.
DAMPED = GPTQ(order=Order.STATIC, damping=0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """`recipe` is what is done; `windows` how many of the calibration windows it sees at most.

    `rounding` names the row that rounds to the same bits; `config` the file the recipe is from.
    `forward` is in what sites multiply while calibrating, where a row says so itself.
    """

    name: str
    what: str
    recipe: jq.Recipe
    windows: int | None = None
    peer: str | None = None
    rounding: str | None = None
    config: str | None = None
    forward: str | None = None


def recipe(name: str, *rules: jq.Rule) -> jq.Recipe:
    """The rules, of linear layers alone: the embedding and the logits tied to it are left."""
    return jq.Recipe(name=name, rules=(jq.Rule(match="*embed*"), *rules))


def weights(name: str, what: str, scheme: jq.Scheme, **options: Any) -> Row:
    kept = {k: options.pop(k) for k in ("algorithm", "scaling") if k in options}
    made = recipe(name, jq.Rule(match="*", weights=scheme, **kept))
    return Row(name=name, what=what, recipe=made, **options)


def eights(name: str, what: str, **options: Any) -> Row:
    kept = {k: options.pop(k) for k in ("scaling", "outliers", "static") if k in options}
    scheme = STATIC if kept.get("static") else INT8
    made = recipe(name, jq.Rule(match="*", weights=INT8, activations=scheme, **kept))
    return Row(name=name, what=what, recipe=made, **options)


def from_config(name: str, what: str, config: str, **options: Any) -> Row:
    made = jq.recipes.load(CONFIGS / config)
    return Row(name=name, what=what, recipe=made, config=config, **options)


def only_static(kind: str, *matches: str) -> Row:
    """One kind of site with fixed ranges, all others with a scale for each token."""
    rules = [
        jq.Rule(match=match, weights=INT8, activations=STATIC, static=True) for match in matches
    ]
    dynamic = jq.Rule(match="*", weights=INT8, activations=INT8)
    name = f"only_{kind}_static"
    made = recipe(name, *rules, dynamic)
    what = f"W8A8, only {kind.replace('_', ', ')} static"
    return Row(name=name, what=what, recipe=made, windows=32)


AWQ_WINDOWS, SMOOTH_WINDOWS = 16, 32
"""As many as the peers were given."""

FOUR_BITS = (
    weights("sym_round", "W4 sym g64, rounding", W4, peer="sym_round"),
    weights(
        "sym_range", "W4 sym g64, range search", W4,
        algorithm=SEARCH, peer="sym_round", rounding="sym_round",
    ),
    weights(
        "sym_gptq_usual", "W4 sym g64, GPTQ, static act-order, damping 0.01", W4,
        algorithm=USUAL, peer="sym_gptq", rounding="sym_round",
    ),
    weights(
        "sym_gptq", "W4 sym g64, GPTQ, static act-order, damping 0.1, range search", W4,
        algorithm=BEST, peer="sym_gptq", rounding="sym_round",
    ),
    weights(
        "sym_gptq_stored", "the same without act-order", W4,
        algorithm=dataclasses.replace(BEST, order=Order.STORED),
        peer="sym_gptq_stored", rounding="sym_round",
    ),
    weights(
        "sym_gptq_grouped", "the same in group-aware order", W4,
        algorithm=dataclasses.replace(BEST, order=Order.GROUPED), rounding="sym_round",
    ),
    weights(
        "sym_gptq_qep", "the same, static act-order, with error-propagating targets (QEP 0.5)", W4,
        algorithm=dataclasses.replace(BEST, correction=0.5),
        peer="sym_gptq", rounding="sym_round",
    ),
    weights(
        "sym_gptq_bf16", "static act-order again, calibrated with products in bfloat16", W4,
        algorithm=BEST, peer="sym_gptq", rounding="sym_round", forward="bfloat16",
    ),
    weights(
        "sym_gptq_qep_bf16", "QEP 0.5, calibrated with products in bfloat16", W4,
        algorithm=dataclasses.replace(BEST, correction=0.5),
        peer="sym_gptq", rounding="sym_round", forward="bfloat16",
    ),
    weights(
        "sym_gptq_damping", "GPTQ, static act-order, damping 1e-4, range search", W4,
        algorithm=dataclasses.replace(BEST, damping=1e-4),
        peer="sym_gptq_damping", rounding="sym_round",
    ),
    weights("asym_round", "W4 asym g64, rounding", A4, peer="asym_round"),
    weights(
        "asym_range", "W4 asym g64, range search", A4,
        algorithm=SEARCH, peer="asym_round", rounding="asym_round",
    ),
    weights(
        "asym_gptq", "W4 asym g64, GPTQ, static act-order, damping 0.1, range search", A4,
        algorithm=BEST, peer="asym_gptq", rounding="asym_round",
    ),
    weights(
        "asym_gptq_qep", "the same, with error-propagating targets (QEP 0.5)", A4,
        algorithm=dataclasses.replace(BEST, correction=0.5),
        peer="asym_gptq", rounding="asym_round",
    ),
    weights(
        "awq", "W4 asym g64, AWQ", A4,
        scaling=AWQ(), windows=AWQ_WINDOWS, peer="awq", rounding="asym_round",
    ),
    weights(
        "awq_range", "W4 asym g64, AWQ, range search", A4,
        scaling=AWQ(), algorithm=SEARCH, windows=AWQ_WINDOWS, peer="awq", rounding="asym_round",
    ),
    weights(
        "awq_gptq", "W4 asym g64, AWQ, then GPTQ as above", A4,
        scaling=AWQ(), algorithm=BEST, rounding="asym_round",
    ),
    weights(
        "awq_gptq_qep", "the same, with error-propagating targets (QEP 0.5)", A4,
        scaling=AWQ(), algorithm=dataclasses.replace(BEST, correction=0.5), rounding="asym_round",
    ),
    weights("hqq", "W4 g64, HQQ", H4, algorithm=HQQ(), peer="hqq"),
    weights(
        "hqq_refit", "the same, scales refitted", H4, algorithm=HQQ(refit_scale=True), peer="hqq"
    ),
    weights(
        "hqq_unrounded", "W4 g64, HQQ, the first zero points not rounded", H4,
        algorithm=HQQ(round_zero=False),
    ),
    weights("channel_round", "W4 sym per channel, rounding", CHANNELS, peer="channel_round"),
    weights(
        "channel_gptq", "W4 sym per channel, GPTQ, damping 0.1, range search", CHANNELS,
        algorithm=BEST, peer="channel_gptq", rounding="channel_round",
    ),
)  # fmt: skip

FLOATS = (
    weights("nf4", "NF4, blocks of 64", jq.schemes.NF4, peer="nf4"),
    weights("nf4_gptq", "NF4, GPTQ, range search", jq.schemes.NF4, algorithm=BEST, rounding="nf4"),
    weights("nvfp4", "NVFP4", jq.schemes.NVFP4, peer="nvfp4"),
    weights("nvfp4_gptq", "NVFP4, GPTQ", jq.schemes.NVFP4, algorithm=DAMPED, rounding="nvfp4"),
    weights("mxfp4", "MXFP4, exponents rounded down (OCP)", jq.schemes.MXFP4, peer="mxfp4"),
    weights("mxfp4_ceil", "MXFP4, exponents rounded up", MXFP4_CEIL, peer="mxfp4"),
    weights("mxfp4_even", "MXFP4, exponents of rounded peaks", MXFP4_EVEN, peer="mxfp4"),
    weights("mxfp4_gptq", "the same, GPTQ", MXFP4_EVEN, algorithm=DAMPED, rounding="mxfp4_even"),
)

FEWER_BITS = (
    weights("w3_round", "W3 sym g64, rounding", W3, peer="w3_round"),
    weights(
        "w3_gptq", "W3 sym g64, GPTQ, damping 0.1, range search", W3,
        algorithm=BEST, peer="w3_gptq", rounding="w3_round",
    ),
    weights(
        "w3_gptq_qep", "the same, with error-propagating targets (QEP 0.5)", W3,
        algorithm=dataclasses.replace(BEST, correction=0.5), peer="w3_gptq", rounding="w3_round",
    ),
    weights("w3_hqq", "W3 g64, HQQ", H3, algorithm=HQQ(), peer="w3_hqq"),
    weights(
        "w3_hqq_unrounded", "W3 g64, HQQ, the first zero points not rounded, as the peer has it",
        H3, algorithm=HQQ(round_zero=False), peer="w3_hqq",
    ),
    weights("w2_round", "W2 asym g64, rounding", A2),
    weights(
        "w2_gptq", "W2 asym g64, GPTQ, damping 0.1, range search", A2,
        algorithm=BEST, rounding="w2_round",
    ),
    weights(
        "w2_gptq_qep", "the same, with error-propagating targets (QEP 0.5)", A2,
        algorithm=dataclasses.replace(BEST, correction=0.5), rounding="w2_round",
    ),
    weights(
        "w2_awq_gptq", "W2 asym g64, AWQ, then GPTQ", A2,
        scaling=AWQ(), algorithm=BEST, rounding="w2_round",
    ),
)  # fmt: skip


def _smooth(static: bool, alpha: float) -> Row:
    kind = "static" if static else "w8a8"
    return eights(
        f"{kind}_smooth{round(10 * alpha)}",
        f"W8A8 {'static per tensor' if static else 'dynamic'}, SmoothQuant {alpha}",
        static=static,
        scaling=SmoothQuant(alpha=alpha),
        windows=SMOOTH_WINDOWS,
        peer=f"{kind}_smooth{round(10 * alpha)}",
    )


def _eight() -> jq.Recipe:
    """Dynamic where a few tokens have inputs far above all others: layers of SmolLM2."""
    scaling = SmoothQuant(alpha=0.6)
    left = [
        jq.Rule(match=f"layers/{i}/mlp/down/*", weights=INT8, activations=INT8, scaling=scaling)
        for i in (1, 2, 9, 10, 11, 27, 28, 29)
    ]
    rest = jq.Rule(match="*", weights=INT8, activations=STATIC, scaling=scaling, static=True)
    return recipe("static_eight", *left, rest)


def _norms_only() -> Row:
    """As the peer has it: what no norm feeds is left as it is."""
    rules = [
        jq.Rule(match=f"*/{kind}/kernel", weights=INT8, activations=INT8) for kind in ("o", "down")
    ]
    rest = jq.Rule(match="*", weights=INT8, activations=INT8, scaling=SmoothQuant(alpha=0.8))
    return Row(
        name="w8a8_smooth8_norms",
        what="W8A8 dynamic, SmoothQuant 0.8 behind norms alone",
        recipe=recipe("w8a8_smooth8_norms", *rules, rest),
        windows=SMOOTH_WINDOWS,
        peer="w8a8_smooth8",
    )


EIGHT_BITS = (
    eights("w8a8", "W8A8 dynamic", peer="w8a8"),
    _smooth(False, 0.5),
    _smooth(False, 0.8),
    _norms_only(),
    from_config("llm_int8", "LLM.int8(), threshold 6", "llm_int8.toml", peer="llm_int8"),
    eights("static", "W8A8 static per tensor", static=True, windows=SMOOTH_WINDOWS, peer="static"),
    _smooth(True, 0.5),
    _smooth(True, 0.8),
    from_config(
        "static_config",
        "W8A8 static by smoothquant_w8a8_static.toml: down inputs dynamic",
        "smoothquant_w8a8_static.toml",
        windows=SMOOTH_WINDOWS,
        peer="static_smooth8",
    ),
    Row(
        name="static_eight",
        what="W8A8 static, SmoothQuant 0.6, down inputs of eight layers dynamic",
        recipe=_eight(),
        windows=SMOOTH_WINDOWS,
        peer="static_smooth8",
    ),
)

KINDS = (
    only_static("q_k_v", "*/q/kernel", "*/k/kernel", "*/v/kernel"),
    only_static("o", "*/o/kernel"),
    only_static("gate_up", "*/gate/kernel", "*/up/kernel"),
    only_static("down", "*/down/kernel"),
)

ROWS = {row.name: row for row in (*FOUR_BITS, *FLOATS, *FEWER_BITS, *EIGHT_BITS, *KINDS)}
QUICK = ("sym_round", "sym_range", "sym_gptq")


def quick(row: Row) -> Row:
    """The row with 6 of the 30 layers quantized, and the rest left as they are."""
    rules = tuple(jq.Rule(match=m) for m in ("layers/[6-9]/*", "layers/[12]?/*"))
    made = dataclasses.replace(row.recipe, rules=(*rules, *row.recipe.rules))
    return dataclasses.replace(row, recipe=made)


SITES = "static_sites"
"""The name of the row that is a table of sites."""
