"""Perplexity, divergence from a reference, agreement: means over windows of tokens."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

_ROWS = 4
"""Rows of logits compared at a time, so that both stay in cache while they are read three times:
with 512 x 49152 logits on two cores, 4 rows take 0.15 s, all at once 0.5 s."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a model predicts windows of tokens, and how far it is from a reference.

    `nll` is the mean of `-log p(token[i] | token[:i])` over positions `i >= 1` of every window, in
    nats; `tokens` is how many positions that are. `kl` is the mean of `KL(reference || model)` over
    the same positions, `top1` the share where both have the same likeliest token.
    `nll_difference` is the model's `nll` less the reference's, `nll_difference_stderr` its standard
    error over windows, which both models share (`None`: one window tells nothing of it).
    These four, and `kl_per_window`, are `None` without a reference. `seconds` is all the time the
    scoring took, the reference's and compiling included; `compile_seconds` is the part that went
    into compiling.
    """

    nll: float
    nll_per_window: tuple[float, ...]
    tokens: int
    seconds: float
    compile_seconds: float
    kl: float | None = None
    top1: float | None = None
    nll_difference: float | None = None
    nll_difference_stderr: float | None = None
    kl_per_window: tuple[float, ...] | None = None

    @property
    def perplexity(self) -> float:
        """`exp(nll)`; infinite where that is too large for a float."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def tokens_per_second(self) -> float:
        """Positions scored in a second of the time that is not compiling."""
        return self.tokens / max(self.seconds - self.compile_seconds, 1e-9)


def score(
    model: Callable[[Any], Any],
    tokens: Any,
    *,
    against: Callable[[Any], Any] | None = None,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores `model` on `tokens` `[windows, length]`, `batch` windows at a time.

    A model maps int32 tokens `[batch, length]` to logits `[batch, length, vocab]`. One that is a
    pytree, as NNX modules are, is passed to the compiled function as arguments; for a Linen model
    give `jax.tree_util.Partial(model.apply, variables)`. Any other callable is compiled with
    what it closes over as constants. Log-probabilities and their differences are float32 on the
    device, sums over positions float64 on the host. `progress` is called with the windows done
    and their number.

    **Raises:** `ValueError` if `tokens` are not windows of ids of the vocabulary, if the two models
    have different vocabularies, or if a score is NaN.

    ```python
    evaluation = score(qmodel, tokens, against=model)
    print(evaluation.nll, evaluation.kl)
    ```
    """
    models = {"model": model}
    return score_all(models, tokens, against=against, batch=batch, progress=progress)["model"]


def score_all(
    models: Mapping[str, Callable[[Any], Any]],
    tokens: Any,
    *,
    against: Callable[[Any], Any] | None = None,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Evaluation]:
    """Scores several models as `score` does each, with the reference computed once.

    `against` may be one of `models`. The `seconds` of each hold the reference's too, as if it had
    been scored alone.

    **Raises:** as `score`.
    """
    windows = checked_windows(tokens)
    if batch < 1:
        raise ValueError(f"batch={batch}; at least one window is scored at a time.")
    batch = min(batch, len(windows))
    shape = (batch, windows.shape[1])
    reference = None if against is None else _compiled(against, shape)
    sides = {
        name: _Side(reference if model is against and reference else _compiled(model, shape))
        for name, model in models.items()
    }
    programs: dict[Any, Any] = {}
    for side in sides.values():
        _check(windows, side.model, reference)
        side.prepare(reference, programs)
    for at in range(0, len(windows), batch):
        part = windows[at : at + batch]
        # The last batch is filled up, so that there is one shape and one program.
        ids = jnp.asarray(np.concatenate([part, windows[: batch - len(part)]]), jnp.int32)
        # One after the other: two models at a time would only take each other's cores.
        theirs = None if reference is None else reference(ids)
        for side in sides.values():
            same = theirs is not None and side.model is reference
            side.measure(theirs if same else side.model(ids), theirs, ids, len(part))
        if progress is not None:
            progress(at + len(part), len(windows))
    return {name: side.summary(windows, reference) for name, side in sides.items()}


class _Compiled:
    """A model compiled for tokens of one shape, and the seconds of compiling and running it."""

    def __init__(self, call: Callable[[Any], Any], logits: Any, compile_seconds: float):
        self.call, self.logits, self.compile_seconds = call, logits, compile_seconds
        self.seconds = 0.0

    def __call__(self, ids: Array) -> Array:
        start = time.perf_counter()
        logits = jax.block_until_ready(self.call(ids))
        self.seconds += time.perf_counter() - start
        return logits


class _Side:
    """A model being scored: its program, the one that measures its logits, what was measured."""

    def __init__(self, model: _Compiled):
        self.model = model
        self.rows: list[tuple[np.ndarray, ...]] = []
        self.compile_seconds = self.seconds = 0.0

    def prepare(self, reference: _Compiled | None, programs: dict[Any, Any]) -> None:
        """Compiles the measuring, unless `programs` has it for these logits."""
        start = time.perf_counter()
        logits = self.model.logits
        tokens = jax.ShapeDtypeStruct(logits.shape[:2], jnp.int32)
        if (key := (logits.shape, logits.dtype)) not in programs:
            if reference is None:
                lowered = jax.jit(_token_nll).lower(logits, tokens)
            else:
                lowered = jax.jit(_token_comparison).lower(logits, reference.logits, tokens)
            programs[key] = lowered.compile()
        self.program = programs[key]
        self.compile_seconds = time.perf_counter() - start

    def measure(self, logits: Any, reference: Array | None, ids: Array, count: int) -> None:
        start = time.perf_counter()
        if reference is None:
            measured = (self.program(logits, ids),)
        else:
            measured = self.program(logits, reference, ids)
        self.rows.append(tuple(np.asarray(x, np.float64)[:count].mean(axis=1) for x in measured))
        self.seconds += time.perf_counter() - start

    def summary(self, windows: np.ndarray, reference: _Compiled | None) -> Evaluation:
        per_window = [np.concatenate(column) for column in zip(*self.rows, strict=True)]
        programs = {id(each): each for each in (self.model, reference) if each is not None}
        compiling = self.compile_seconds + sum(p.compile_seconds for p in programs.values())
        running = self.seconds + sum(p.seconds for p in programs.values())
        return _summary(per_window, windows, compiling, compiling + running)


def checked_windows(tokens: Any) -> np.ndarray:
    """Windows of token ids as a NumPy array `[windows, length]`.

    **Raises:** `ValueError` for another rank or dtype, negative ids, or too few tokens.
    """
    windows = np.asarray(tokens)
    if windows.ndim != 2 or not np.issubdtype(windows.dtype, np.integer):
        raise ValueError(
            f"Tokens are integers [windows, length], but these are {windows.dtype}"
            f"{list(windows.shape)}. Give ids, a row for each window."
        )
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"Tokens of shape {list(windows.shape)} leave nothing to predict: at least 1 window "
            "of at least 2 tokens is wanted."
        )
    if windows.min() < 0:
        raise ValueError(f"Token ids start at 0, but {int(windows.min())} is among these.")
    return windows


def _compiled(model: Any, shape: tuple[int, int]) -> _Compiled:
    """The scores are a program of their own: XLA's CPU backend would else fuse the product that
    makes the logits into the sums over them, and take twice as long."""
    start = time.perf_counter()
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    is_tree = not jax.tree_util.all_leaves([model])
    if is_tree:
        model = jax.tree.map(_passable, model)
        lowered = jax.jit(lambda model, ids: model(ids)).lower(model, tokens)
    else:
        lowered = jax.jit(lambda ids: model(ids)).lower(tokens)
    logits = lowered.out_info
    found = getattr(logits, "shape", ())
    if len(found) != 3 or found[:2] != shape:
        got = list(found) if hasattr(logits, "shape") else type(logits).__name__
        raise ValueError(
            f"A model maps tokens {list(shape)} to logits [{shape[0]}, {shape[1]}, vocab], but "
            f"this one gives {got}. Wrap it in a function that returns the logits alone."
        )
    program = lowered.compile()
    bound = (model,) if is_tree else ()
    return _Compiled(
        lambda ids: program(*bound, ids),
        jax.ShapeDtypeStruct(found, logits.dtype),
        time.perf_counter() - start,
    )


def _passable(x: Any) -> Any:
    """An array as a compiled program takes it.

    Before JAX 0.12 arrays of fewer than 8 bits that were put on a device forgot that they are
    packed, and programs compiled ahead of time refuse them. Of those that nobody put anywhere the
    layout is not asked.
    """
    if not isinstance(x, jax.Array) or jax.dtypes.itemsize_bits(x.dtype) >= 8:
        return x
    one = x.committed and len(x.sharding.device_set) == 1
    return jnp.asarray(np.asarray(x)) if one else x


def _check(windows: np.ndarray, model: _Compiled, reference: _Compiled | None) -> None:
    vocabulary = model.logits.shape[-1]
    if reference is not None and reference.logits.shape[-1] != vocabulary:
        raise ValueError(
            f"The model has {vocabulary} tokens in its vocabulary and the reference "
            f"{reference.logits.shape[-1]}. Only models that share a vocabulary can be compared."
        )
    highest = int(windows.max())
    if highest >= vocabulary:
        raise ValueError(
            f"The tokens go up to id {highest}, but the model's vocabulary has {vocabulary}. "
            "Tokenize the text with the model's own tokenizer."
        )


def _row_nll(
    logits: Float[Array, " vocab"], target: Int32[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`log sum exp`, and that less the target's logit."""
    total = jax.nn.logsumexp(logits)
    return total, total - logits[target]


def _token_nll(
    logits: Float[Array, "batch length vocab"], tokens: Int32[Array, "batch length"]
) -> Float[Array, "batch predicted"]:
    """`-log p` of each token but the first, from the logits at the position before it."""
    # Rolling the tokens costs nothing; slicing the last position off the logits copies them.
    targets = jnp.roll(tokens, -1, axis=1)
    wide = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(wide, axis=-1)
    picked = jnp.take_along_axis(wide, targets[..., None], axis=-1)[..., 0]
    return (total - picked)[:, :-1]


def _token_comparison(
    logits: Float[Array, "batch length vocab"],
    reference: Float[Array, "batch length vocab"],
    tokens: Int32[Array, "batch length"],
) -> tuple[
    Float[Array, "batch predicted"],
    Float[Array, "batch predicted"],
    Float[Array, "batch predicted"],
    Bool[Array, "batch predicted"],
]:
    """At each position: both `-log p`, `KL(reference || model)`, and whether both agree."""

    def row(parts: Any) -> Any:
        ours, theirs = (part.astype(jnp.float32) for part in parts[:2])
        total, nll = _row_nll(ours, parts[2])
        reference_total, reference_nll = _row_nll(theirs, parts[2])
        p = jnp.exp(theirs - reference_total)
        # sum p (log p - log q), with both normalizers taken out of the sum.
        divergence = jnp.sum(p * (theirs - ours)) + total - reference_total
        return nll, reference_nll, divergence, jnp.argmax(ours) == jnp.argmax(theirs)

    batch, length, vocab = logits.shape
    targets = jnp.roll(tokens, -1, axis=1).reshape(-1)
    flat = (logits.reshape(-1, vocab), reference.reshape(-1, vocab), targets)
    measured = jax.lax.map(row, flat, batch_size=_ROWS)
    nll, reference_nll, divergence, agree = (x.reshape(batch, length)[:, :-1] for x in measured)
    return nll, reference_nll, divergence, agree


def _summary(
    per_window: list[np.ndarray], windows: np.ndarray, compile_seconds: float, seconds: float
) -> Evaluation:
    nll = per_window[0]
    for name, values in zip(("", " of the reference", " divergence"), per_window, strict=False):
        if not np.isfinite(values).all():
            where = int(np.argmin(np.isfinite(values)))
            raise ValueError(
                f"The score{name} is {values[where]} in window {where}. The model gives NaN or "
                "infinite logits: check its weights, and that its dtype holds its activations."
            )
    extra: dict[str, Any] = {}
    if len(per_window) > 1:
        difference = nll - per_window[1]
        count = len(difference)
        extra = {
            "kl": float(per_window[2].mean()),
            "kl_per_window": tuple(float(x) for x in per_window[2]),
            "top1": float(per_window[3].mean()),
            "nll_difference": float(difference.mean()),
            "nll_difference_stderr": (
                float(difference.std(ddof=1) / math.sqrt(count)) if count > 1 else None
            ),
        }
    return Evaluation(
        nll=float(nll.mean()),
        nll_per_window=tuple(float(x) for x in nll),
        tokens=windows.shape[0] * (windows.shape[1] - 1),
        seconds=seconds,
        compile_seconds=compile_seconds,
        **extra,
    )
