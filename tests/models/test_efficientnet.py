"""EfficientNet-Lite0 gives what its PyTorch port gives, with normalization folded in or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxquant.checkpoint import CheckpointError, materialize
from jaxquant.models import (
    EfficientNetLite0,
    find_efficientnet_lite0,
    fold_batch_norm,
    load_efficientnet_lite0,
    normalize_pixels,
)
from jaxquant.models._efficientnet import efficientnet_origins


def _shapes(model=None):
    images = jnp.zeros((1, 32, 32, 3))
    return jax.eval_shape((model or EfficientNetLite0()).init, jax.random.key(0), images)


def test_the_map_names_each_variable_once():
    shapes = _shapes()
    paths = {tuple(part.key for part in path) for path, _ in jax.tree.leaves_with_path(shapes)}
    origins = efficientnet_origins()
    assert origins.keys() == paths
    assert len({origin.name for origin in origins.values()}) == len(paths)


def test_folding_changes_no_output():
    rng = np.random.default_rng(0)

    def random(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            return np.float32(rng.normal(size=leaf.shape) * np.sqrt(2 / fan_in))
        if name in ("var", "scale"):
            return np.float32(rng.uniform(0.5, 2.0, size=leaf.shape))
        return np.float32(rng.normal(size=leaf.shape) / 4)

    plain = EfficientNetLite0(classes=10)
    variables = jax.tree.map_with_path(random, _shapes(plain))
    images = jnp.asarray(rng.uniform(-1, 1, size=(2, 32, 32, 3)), jnp.float32)
    folded = fold_batch_norm(variables)
    assert set(folded) == {"params"}
    assert jax.tree.structure(folded) == jax.tree.structure(_shapes(plain.clone(folded=True)))
    wanted = jax.jit(plain.apply)(variables, images)
    found = jax.jit(plain.clone(folded=True).apply)(folded, images)
    # One after the other, 50 layers of sums, whose roundings differ by some ulp: 4 for each.
    np.testing.assert_allclose(found, wanted, atol=50 * 4 * 2.0**-24 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_computed_in(dtype):
    model = EfficientNetLite0(classes=10, dtype=dtype)
    images = jnp.zeros((1, 32, 32, 3))
    assert jax.eval_shape(model.apply, _shapes(model), images).dtype == dtype


def test_folding_of_a_convolution_that_has_a_bias():
    class Model(nn.Module):
        folded: bool

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3,), name="one")(x)
            return x if self.folded else nn.BatchNorm(True, epsilon=0.5, name="one_norm")(x)

    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    variables = Model(False).init(jax.random.key(1), x)
    keys = iter(jax.random.split(jax.random.key(2), 8))
    variables = jax.tree.map(lambda a: jax.random.uniform(next(keys), a.shape), variables)
    folded = fold_batch_norm({**variables, "cache": {"kept": x}}, epsilon=0.5)
    np.testing.assert_array_equal(folded.pop("cache")["kept"], x)
    np.testing.assert_allclose(
        Model(True).apply(folded, x), Model(False).apply(variables, x), rtol=1e-5, atol=1e-6
    )


def test_a_normalization_without_its_convolution_is_not_lost():
    norm = {"scale": jnp.ones(3), "bias": jnp.ones(3)}
    stats = {"mean": jnp.ones(3), "var": jnp.ones(3)}
    for name in ("dense_norm", "BatchNorm_0"):
        variables = {
            "params": {"block": {"dense": {"other": jnp.ones(3)}, name: norm}},
            "batch_stats": {"block": {name: stats}},
        }
        with pytest.raises(ValueError, match=f"block/{name} normalizes no convolution named"):
            fold_batch_norm(variables)


def test_pixels_are_normalized_as_in_training():
    np.testing.assert_array_equal(
        normalize_pixels(np.array([0, 127, 255], np.uint8)), np.float32([-127 / 128, 0, 1])
    )


def test_another_file_is_refused(golden):
    with pytest.raises(CheckpointError, match="has no tensor '_fc.bias' among its 21"):
        load_efficientnet_lite0(golden / "torch_legacy.pt")


@pytest.mark.registry
def test_it_gives_the_logits_of_the_pytorch_port(golden):
    loaded = load_efficientnet_lite0(find_efficientnet_lite0())
    assert loaded.source == "float32/int64 PyTorch file"
    variables = materialize(loaded.variables)
    y, x = np.mgrid[0:224, 0:224]
    waves = [127 + 120 * np.sin(y / (7 + c) + x / (11 - 2 * c) + c) for c in range(3)]
    images = jnp.asarray(normalize_pixels(np.stack(waves, axis=-1)[None]))
    with np.load(golden / "second_models.npz") as wanted:
        logits = jax.jit(loaded.model.apply)(variables, images)
        # Found: 1e-5, of logits of up to 11.
        np.testing.assert_allclose(logits[0, ::25], wanted["efficientnet_logits"], atol=1e-4)
        folded = loaded.model.clone(folded=True)
        logits = jax.jit(folded.apply)(fold_batch_norm(variables), images)
        np.testing.assert_allclose(logits[0, ::25], wanted["efficientnet_logits"], atol=1e-4)
