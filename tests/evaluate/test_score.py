"""What a score means: laws with known answers, NumPy by hand, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

from jaxquant.evaluate import score, score_all

VOCAB, WINDOWS, LENGTH = 40, 5, 7


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (WINDOWS, LENGTH)).astype(np.int32)


class Bigram(nnx.Module):
    """Logits that depend on the last token alone: a table, so that NumPy can follow."""

    def __init__(self, seed: int, vocab: int = VOCAB):
        table = np.random.default_rng(seed).normal(size=(vocab, vocab)).astype(np.float32)
        self.table = nnx.Param(jnp.asarray(table))

    def __call__(self, tokens):
        return self.table[...][tokens]


def by_hand(model: Bigram, tokens: np.ndarray) -> np.ndarray:
    """`log p` of every token after every position, in float64."""
    logits = np.asarray(model.table[...], np.float64)[tokens[:, :-1]]
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary(tokens):
    evaluation = score(lambda ids: jnp.zeros((*ids.shape, VOCAB)), tokens)
    assert evaluation.nll == pytest.approx(np.log(VOCAB), rel=1e-6)
    assert evaluation.perplexity == pytest.approx(VOCAB, rel=1e-5)
    assert evaluation.tokens == WINDOWS * (LENGTH - 1)
    assert evaluation.kl is evaluation.top1 is evaluation.nll_difference is None
    assert evaluation.kl_per_window is None


def test_a_model_against_itself_has_no_divergence_at_all(tokens):
    evaluation = score(Bigram(0), tokens, against=Bigram(0))
    assert evaluation.kl == evaluation.nll_difference == evaluation.nll_difference_stderr == 0
    assert evaluation.top1 == 1


def test_numpy_finds_the_same(tokens):
    model, reference = Bigram(1), Bigram(2)
    ours, theirs = by_hand(model, tokens), by_hand(reference, tokens)
    nll, reference_nll = (
        -np.take_along_axis(x, tokens[:, 1:, None], -1)[..., 0].mean(-1) for x in (ours, theirs)
    )
    difference = nll - reference_nll
    evaluation = score(model, tokens, against=reference)
    # float32 on the device: the log of a sum of 40 exponentials, and a mean of those.
    near = {"rel": 64 * float(np.finfo(np.float32).eps), "abs": 1e-6}
    assert evaluation.nll_per_window == pytest.approx(tuple(nll), **near)
    assert evaluation.nll == pytest.approx(nll.mean(), **near)
    assert evaluation.kl == pytest.approx((np.exp(theirs) * (theirs - ours)).sum(-1).mean(), **near)
    divergence = (np.exp(theirs) * (theirs - ours)).sum(-1).mean(axis=1)
    assert evaluation.kl_per_window == pytest.approx(divergence, **near)
    assert evaluation.top1 == (ours.argmax(-1) == theirs.argmax(-1)).mean()
    assert evaluation.nll_difference == pytest.approx(difference.mean(), **near)
    expected = difference.std(ddof=1) / np.sqrt(WINDOWS)
    assert evaluation.nll_difference_stderr == pytest.approx(expected, **near)


@pytest.mark.parametrize("batch", [2, 3, 5, 64])
def test_the_batch_does_not_matter(tokens, batch):
    one = score(Bigram(1), tokens, against=Bigram(2))
    other = score(Bigram(1), tokens, against=Bigram(2), batch=batch)
    assert other.nll_per_window == pytest.approx(one.nll_per_window, rel=1e-6)
    assert (other.kl, other.top1) == (pytest.approx(one.kl, rel=1e-6), one.top1)


def test_several_are_scored_as_each_alone(tokens):
    models = {"a": Bigram(1), "b": Bigram(2), "c": Bigram(3)}
    together = score_all(models, tokens, against=models["b"], batch=2)
    for name, model in models.items():
        alone = score(model, tokens, against=models["b"], batch=2)
        assert together[name].nll_per_window == alone.nll_per_window
        assert together[name].kl == alone.kl
    assert together["b"].kl == 0


def test_linen_models_and_plain_functions_are_scored_alike(tokens):
    model = nn.Embed(VOCAB, VOCAB)
    variables = model.init(jax.random.key(0), jnp.asarray(tokens))
    as_tree = score(jax.tree_util.Partial(model.apply, variables), tokens)
    closed_over = score(lambda ids: model.apply(variables, ids), tokens)
    assert as_tree.nll_per_window == closed_over.nll_per_window


def test_codes_of_few_bits_may_be_put_on_a_device(tokens):
    codes = jnp.arange(VOCAB * VOCAB).reshape(VOCAB, VOCAB).astype(jnp.uint4)

    def model(codes, ids):
        return codes[ids].astype(jnp.float32)

    free = score(jax.tree_util.Partial(model, codes), tokens)
    put = score(jax.tree_util.Partial(model, jax.device_put(codes, jax.devices()[0])), tokens)
    assert put.nll_per_window == free.nll_per_window


def test_logits_of_two_bytes_are_compared_in_four(tokens):
    model = Bigram(1)
    half = lambda ids: model(ids).astype(jnp.bfloat16)  # noqa: E731
    rounded = lambda ids: model(ids).astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
    assert score(half, tokens, against=rounded).kl == 0
    assert 0 < score(half, tokens, against=model).kl < 1e-3


def test_one_window_has_no_standard_error(tokens):
    evaluation = score(Bigram(1), tokens[:1], against=Bigram(2))
    assert evaluation.nll_difference_stderr is None


def test_time_is_told_with_compiling_apart(tokens):
    evaluation = score(Bigram(1), tokens)
    assert 0 < evaluation.compile_seconds < evaluation.seconds
    running = evaluation.seconds - evaluation.compile_seconds
    assert evaluation.tokens_per_second == pytest.approx(evaluation.tokens / running)


def test_progress_counts_windows(tokens):
    seen = []
    score(Bigram(1), tokens, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (np.zeros(7, np.int32), r"int32\[7\]"),
        (np.zeros((2, 7), np.float32), r"float32\[2, 7\]"),
        (np.zeros((0, 7), np.int32), "at least 1 window"),
        (np.zeros((2, 1), np.int32), "at least 2 tokens"),
        (np.full((2, 7), -1), "-1 is among these"),
        (np.full((2, 7), VOCAB), f"up to id {VOCAB}, but the model's vocabulary has {VOCAB}"),
        (np.full((2, 7), 2**40), "up to id 1099511627776"),
    ],
)
def test_tokens_that_are_no_windows_of_ids_are_refused(bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        score(Bigram(0), bad)


def test_what_cannot_be_compared_is_refused(tokens):
    with pytest.raises(ValueError, match="40 tokens in its vocabulary and the reference 41"):
        score(Bigram(0), tokens, against=Bigram(0, VOCAB + 1))
    with pytest.raises(ValueError, match="batch=0"):
        score(Bigram(0), tokens, batch=0)
    with pytest.raises(ValueError, match=r"gives \[1, 7\]. Wrap it"):
        score(lambda ids: ids.astype(jnp.float32), tokens)
    with pytest.raises(ValueError, match="gives tuple"):
        score(lambda ids: (ids, ids), tokens)


def test_a_model_that_gives_nan_is_named(tokens):
    model = lambda ids: jnp.where(ids[..., None] == ids[0, 0], jnp.nan, jnp.zeros((VOCAB,)))  # noqa: E731
    with pytest.raises(ValueError, match="nan in window 0. The model gives NaN"):
        score(model, tokens)
