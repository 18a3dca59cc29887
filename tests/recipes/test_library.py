"""Named recipes: each is published, equals its file, and does what its name says to a model."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from jaxquant import recipes
from jaxquant.algorithms import quantize
from jaxquant.calibrate import calibrate
from jaxquant.intercept import plan, Recipe, wrap
from jaxquant.numerics import E2M1, E4M3, INT3, INT4, INT8, NF4, TERNARY, UINT2, UINT4

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"

every_recipe = pytest.mark.parametrize("recipe", recipes.NAMED.values(), ids=recipes.NAMED)


class Model(nn.Module):
    """Embedding, norm, a layer, a head of its own and tied logits."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(32, 128, name="embed")
        x = nn.LayerNorm(name="norm")(embed(tokens))
        x = x + nn.Dense(128, name="layer")(x)
        return nn.Dense(32, name="head")(x) + embed.attend(x)


TOKENS = jnp.array([[3, 1, 4, 1, 5]])

# Name -> formats of the layer's weights, its activations, and the embedding and logits.
WANTED = {
    "w8a16": (INT8, None, None),
    "w4a16_g64": (INT4, None, None),
    "w4a16_g128": (INT4, None, None),
    "w4a16_g64_e8": (INT4, None, INT8),
    "w8a8": (INT8, INT8, None),
    "llm_int8": (INT8, INT8, None),
    "fp8": (E4M3, E4M3, None),
    "mxfp8": (E4M3, E4M3, None),
    "mxfp4": (E2M1, None, None),
    "nvfp4": (E2M1, None, None),
    "nf4_double": (NF4, None, None),
    "gptq_w4_sym_g64": (INT4, None, None),
    "gptq_w4_asym_g64": (UINT4, None, None),
    "gptq_w3_sym_g64": (INT3, None, None),
    "gptq_w2_asym_g64": (UINT2, None, None),
    "awq_w4_asym_g64": (UINT4, None, None),
    "smoothquant_w8a8": (INT8, INT8, None),
    "smoothquant_w8a8_static": (INT8, INT8, None),
    "hqq_w4_g64": (UINT4, None, None),
    "w4a8_lsq": (INT4, INT8, None),
    "bitnet_b158": (TERNARY, INT8, None),
    "qlora": (NF4, None, None),
    "fp8_train_delayed": (E4M3, E4M3, None),
    "fp8_train_current": (E4M3, E4M3, None),
    "fp8_train_row": (E4M3, E4M3, None),
    "fp8_train_block": (E4M3, E4M3, None),
    "fp8_train_mx": (E4M3, E4M3, None),
}
# Name -> what chooses codes and factors, and whether scales of activations are fixed; for those
# that have any of it.
CHOOSING = {
    **dict.fromkeys((name for name in WANTED if name.startswith("gptq")), ("gptq", None, False)),
    "awq_w4_asym_g64": ("range_search", "awq", False),
    "smoothquant_w8a8": (None, "smoothquant", False),
    "smoothquant_w8a8_static": (None, "smoothquant", True),
    "hqq_w4_g64": ("hqq", None, False),
    "fp8_train_delayed": (None, None, True),
}


@every_recipe
def test_every_recipe_equals_its_file(recipe: Recipe):
    assert recipes.load(CONFIGS / f"{recipe.name}.toml") == recipe


def test_every_file_is_a_named_recipe():
    assert {path.stem for path in CONFIGS.glob("*.toml")} == set(recipes.NAMED)


@every_recipe
def test_every_file_says_what_it_costs_and_gives(recipe: Recipe):
    text = (CONFIGS / f"{recipe.name}.toml").read_text()
    assert "# Costs: " in text and "# Gives: " in text


@every_recipe
def test_every_recipe_has_a_source_and_survives_being_written(recipe: Recipe):
    assert recipe.source
    assert recipes.parse(recipes.dump(recipe)) == recipe


@every_recipe
def test_every_recipe_does_what_its_name_says(recipe: Recipe):
    model = Model()
    variables = model.init(jax.random.key(0), TOKENS)
    made = plan(model, variables, TOKENS, recipe=recipe)
    weights, activations, ends = WANTED[recipe.name]

    def formats(site):
        found = made.by_site[site]
        return tuple(s if s is None else s.values for s in (found.weights, found.activations))

    assert formats("layer/kernel#dot") == (weights, activations)
    for site in ("embed/embedding#take", "embed/embedding#dot", "head/kernel#dot"):
        assert formats(site) == (ends, None)
    assert not any("norm" in site for site in made.by_site)
    site = made.by_site["layer/kernel#dot"]
    ways = [x if x is None else x.name for x in (site.algorithm, site.scaling)]
    assert (*ways, site.static) == CHOOSING.get(recipe.name, (None, None, False))
    if made.needs_calibration:
        qvariables = calibrate(model, variables, [(TOKENS,)], made).qvariables
    else:
        qvariables = quantize(variables, made)
    logits = wrap(model, made).apply(qvariables, TOKENS)
    assert jnp.isfinite(logits).all()


def test_a_recipe_is_found_by_name_in_any_case_and_by_file():
    assert recipes.by_name("W4A16_G64") is recipes.W4A16_G64
    assert recipes.find("w8a8") is recipes.W8A8
    assert recipes.find(CONFIGS / "fp8.toml") == recipes.FP8


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="'w4a16g64'; the nearest is 'w4a16_g64'"):
        recipes.by_name("w4a16g64")
