"""Which folds are found. That they leave the function as it is: `tests/algorithms`."""

import fold_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxquant.intercept._folds import find_folds
from jaxquant.intercept._graph import trace


def folds_of(case):
    make, lines = case
    model, variables, args, _ = make()
    return find_folds(trace(model, variables, *args)), lines


@pytest.mark.parametrize("name", fold_cases.CASES)
def test_exactly_the_expected_folds_are_found(name):
    folds, lines = folds_of(fold_cases.CASES[name])
    assert list(map(str, folds)) == lines


def test_rows_and_columns_have_the_same_channels():
    folds, _ = folds_of(fold_cases.CASES["linear to linear"])
    (fold,) = folds
    bias, kernel = fold.sources
    (site,) = fold.sites
    assert fold.shape == (8,) and fold.channels is None and site.site == "b/kernel#dot"
    np.testing.assert_array_equal(site.channels, np.arange(8)[:, None])
    np.testing.assert_array_equal(kernel.channels, np.arange(8)[None])
    np.testing.assert_array_equal(bias.channels, np.arange(8))


def test_query_heads_that_share_a_key_head_share_factors():
    folds, _ = folds_of(fold_cases.CASES["llama"])
    fold = folds[1]
    # 4 query heads of 16, of which two each read one of 2 key heads.
    wanted = np.arange(64).reshape(2, 2, 16)[:, :1].repeat(2, axis=1).reshape(-1)
    np.testing.assert_array_equal(fold.channels, wanted)


def test_only_the_columns_that_are_used_in_proportion_are_scaled():
    folds, _ = folds_of(fold_cases.CASES["half of a joined linear"])
    (source,) = folds[0].sources
    np.testing.assert_array_equal(source.channels, [[*[-1] * 8, *range(8)]])


def test_inputs_that_cannot_be_scaled_are_named():
    (fold,), _ = folds_of(fold_cases.CASES["half of an input"])
    np.testing.assert_array_equal(fold.channels, [*range(8), *[-1] * 8])
    np.testing.assert_array_equal(fold.sites[0].channels[:, 0], fold.channels)
    np.testing.assert_array_equal(fold.sources[0].channels, np.arange(8))


def test_each_expert_has_factors_of_its_own_where_only_experts_read_them():
    folds, _ = folds_of(fold_cases.CASES["experts, scanned"])
    shapes = [fold.shape for fold in folds[:4]]
    assert shapes == [(16,), (16,), (16,), (4, 32)]
    (up,), (down,) = folds[3].sources, folds[3].sites
    assert up.channels.shape == (4, 1, 32) and down.channels.shape == (4, 32, 1)
    np.testing.assert_array_equal(up.channels.reshape(-1), np.arange(128))
    np.testing.assert_array_equal(down.channels.reshape(-1), np.arange(128))
    # The router reads the same input as all experts do.
    assert [site.site for site in folds[2].sites] == [
        "layers/experts/router/kernel#dot",
        "layers/experts/up#ragged_dot",
    ]
    assert [fold.shape for fold in folds_of(fold_cases.CASES["stacked experts"])[0]] == [
        (8,),
        (2, 6),
    ]


class Experts(nn.Module):
    """Rows come back in their own order between the two products, or get a bias of all experts."""

    reordered: bool = False
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        rows = x.reshape(-1, 8)
        sizes = jnp.asarray([10, 6], jnp.int32)
        up = self.param("up", nn.initializers.normal(1.0), (2, 8, 6))
        down = self.param("down", nn.initializers.normal(1.0), (2, 6, 8))
        rows = jax.lax.ragged_dot(rows, up, sizes)
        if self.bias:
            rows = rows + self.param("bias", nn.initializers.normal(1.0), (6,)).reshape(1, 6)
        rows = nn.relu(rows)
        if self.reordered:
            rows = rows[::-1]
        return jax.lax.ragged_dot(rows, down, sizes)


@pytest.mark.parametrize("reordered, bias", [(True, False), (False, True)])
def test_experts_whose_rows_mix_share_their_factors(reordered, bias):
    model, variables, args, _ = fold_cases.linen(Experts(reordered=reordered, bias=bias), X)
    (fold,) = find_folds(trace(model, variables, *args))
    assert fold.shape == (6,)


X = fold_cases.X


class Refused(nn.Module):
    what: str

    @nn.compact
    def __call__(self, x):
        norm, dense = nn.RMSNorm(name="norm"), nn.Dense(8, name="a", use_bias=False)
        y = norm(x)
        if self.what == "the input is returned":
            return dense(y), y
        if self.what == "the norm is used twice":
            return dense(y), nn.Dense(8, name="b")(norm(x + 1.0))
        if self.what == "the linear is used twice":
            return dense(jnp.tanh(dense(y)))
        if self.what == "the weight is used otherwise":
            kernel = self.param("w", nn.initializers.normal(1.0), (8, 8))
            return y @ kernel + kernel.sum()
        if self.what == "the scale is shifted":
            scale = self.param("scale", nn.initializers.zeros, (8,))
            return dense(jnp.tanh(x) * (1.0 + scale.reshape(1, 1, 8)))
        if self.what == "the input also meets something else":
            return dense(y) + jnp.tanh(y)
        if self.what == "the stack is also read as a whole":
            stack = self.param("w", nn.initializers.normal(1.0), (3, 8, 8))
            out, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x) @ w, None), y, stack)
            return out * stack.sum()
        assert self.what == "the source sits in a cond"
        scale = self.param("scale", nn.initializers.ones, (1, 1, 8))
        return dense(jax.lax.cond(x.sum() > 0, lambda: x * scale, lambda: x))


@pytest.mark.parametrize(
    "what",
    [
        "the input is returned",
        "the norm is used twice",
        "the linear is used twice",
        "the weight is used otherwise",
        "the scale is shifted",
        "the input also meets something else",
        "the stack is also read as a whole",
        "the source sits in a cond",
    ],
)
def test_no_fold_where(what):
    model = Refused(what=what)
    assert find_folds(trace(model, model.init(jax.random.key(0), X), X)) == ()


def test_a_graph_of_shapes_gives_the_same_folds():
    model, variables, args, _ = fold_cases.CASES["gpt2"][0]()
    shapes = jax.eval_shape(lambda: variables)
    whole, abstract = (find_folds(trace(model, v, *args)) for v in (variables, shapes))
    assert list(map(str, whole)) == list(map(str, abstract))
    for a, b in zip(whole, abstract, strict=True):
        for x, y in zip((*a.sources, *a.sites), (*b.sources, *b.sites), strict=True):
            np.testing.assert_array_equal(x.channels, y.channels)
