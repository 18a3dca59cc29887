import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_loop import Group, learning_rate, make_optimizer, Optimizer
from training_loop.optimizer import weight_decay


def test_cosine_rises_and_falls_to_its_end():
    rate = learning_rate(Optimizer(learning_rate=1.0, warmup=10, final=0.1), 110)
    assert [float(rate(step)) for step in (0, 9, 10)] == pytest.approx([0.1, 0.91, 1.0])
    # Half of the cosine: in the middle between the ends.
    assert float(rate(60)) == pytest.approx(0.55)
    assert float(rate(110)) == pytest.approx(0.1)


def test_two_stages_fall_by_lines_with_a_drop_between():
    """8/15 of the peak at half of the steps, 5/15 right after, 0 at the end."""
    rate = learning_rate(Optimizer(learning_rate=1.5e-3, warmup=10, schedule="two_stage"), 210)
    at = {step: float(rate(step)) for step in (10, 57, 104, 105, 210)}
    assert at[10] == pytest.approx(1.5e-3)
    assert at[57] == pytest.approx(1.5e-3 - 0.7e-3 * 47 / 95)
    assert at[104] == pytest.approx(1.5e-3 - 0.7e-3 * 94 / 95)
    assert at[105] == pytest.approx(0.5e-3)
    assert at[210] == pytest.approx(0.0, abs=1e-9)
    decay = weight_decay(Optimizer(learning_rate=1.0, schedule="two_stage"), 0.1, 210)
    assert callable(decay)
    assert [float(decay(step)) for step in (0, 104, 105)] == pytest.approx([0.1, 0.1, 0.0])


def one_update(settings: Optimizer, labels=None):
    variables = {"w": jnp.ones((2, 2)), "v": jnp.ones((2,)), "scale": jnp.ones((2, 2))}
    optimizer = make_optimizer(settings, 10, labels)
    gradients = jax.tree.map(lambda x: 3 * x, variables)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(gradients, optimizer.init(variables), variables)
    return {name: float(np.unique(x).item()) for name, x in updates.items()}


def test_matrices_decay_vectors_do_not_and_groups_are_apart():
    """The first update of Adam is the rate, against the gradient's sign."""
    settings = Optimizer(
        learning_rate=0.1,
        schedule="constant",
        weight_decay=0.5,
        groups={"learned": Group(rate=0.2, weight_decay=0.0)},
    )

    def labels(variables):
        return {name: "learned" if name == "scale" else "weights" for name in variables}

    found = one_update(settings, labels)
    assert found == pytest.approx({"w": -0.15, "v": -0.1, "scale": -0.02}, rel=1e-5)
    with pytest.raises(ValueError, match="groups learned, and this problem has no labels"):
        make_optimizer(settings, 10)


def test_the_norm_is_clipped_over_all_leaves():
    settings = Optimizer(learning_rate=1.0, schedule="constant", clip=1.0, weight_decay=0.0)
    optimizer = make_optimizer(settings, 10)
    small, large = ({"w": jnp.full((4, 4), size)} for size in (1.0, 100.0))
    moments = []
    for gradients in (small, large):
        state = optimizer.init(gradients)
        with jax.numpy_dtype_promotion("standard"):
            _, state = optimizer.update(gradients, state, gradients)
        moments.append([np.asarray(x) for x in jax.tree.leaves(state) if x.shape == (4, 4)])
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
