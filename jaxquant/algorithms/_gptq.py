"""GPTQ: columns are rounded in turn, each making up for the errors of those before it.

Frantar et al. 2022, arXiv:2210.17323. Damping, dead columns and scales as in its code, but for
groups within a block, whose scales are made of columns as they are when their turn comes.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from ..intercept._observers import Drift, Gram
from ..numerics import Format
from ..numerics._scale import zero_point as zero_point_of
from ..qarray import dequantize, QArray, quantize_array, Scheme, tile_shape
from ..qarray._qarray import scale_values, spread
from ..qarray._quantize import stored_scale, stored_zero_point, wanted_scale
from ._columns import Given, Grid, InTurn, round_columns
from ._factor import damped_factor, made_up
from ._health import Health, told
from ._matrix import Chosen
from ._panels import Panels, panels
from ._range_search import check_searchable, RangeSearch, searched


class Order(enum.Enum):
    """In which order columns are rounded, and which of them share a scale."""

    STORED = "stored"
    """As they lie. The default of the paper's code."""
    DESCENDING = "descending"
    """By falling energy of their inputs; neighbours in that order share a scale ("act-order",
    `desc_act`). The inputs of the site have to be permuted, unless there is one scale a row."""
    STATIC = "static"
    """By falling energy, with the scales that the weight had before anything was rounded
    ("static groups"; the default of llm-compressor). Nothing is permuted."""
    GROUPED = "grouped"
    """Groups as they lie, by falling largest energy of a column, and within each its columns by
    falling energy (`act_group_aware` of GPTQModel). Nothing is permuted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ:
    """The algorithm: `run` it on a weight and the Gram matrix of its inputs.

    `damping`, times the mean of its diagonal, is added to the diagonal of the Gram matrix; before
    that, entries off the diagonal are multiplied by `1 - shrink`. About `block` columns are rounded
    before the errors of all of them are multiplied at once: it decides nothing but speed.
    `measured` asks for the losses, with a correction those of the corrected weight. With a `search`
    scales are chosen before anything is rounded, by the diagonal of the Gram matrix.

    With a `correction` above 0, weights also make up for what earlier levels did to their inputs
    (QEP, Arai and Ichikawa 2025, arXiv:2504.09629): they are rounded to `w + correction * w d (gram
    + damping)^-1`, where `d` is the `Drift` of the inputs. 1 is the least squares answer on the
    calibration data; less of it holds better on other data. It costs a pass of the float model
    beside the other one.
    """

    order: Order = Order.STORED
    damping: float = 0.01
    shrink: float = 0.0
    block: int = 128
    measured: bool = False
    search: RangeSearch | None = None
    correction: float = 0.0
    name: str = "gptq"

    def __post_init__(self) -> None:
        if not isinstance(self.order, Order):
            raise ValueError(f"An order is one of {[str(o) for o in Order]}; got {self.order!r}.")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"Damping is a share of the diagonal, at least 0; got {self.damping}.")
        if not 0 <= self.shrink <= 1:
            raise ValueError(f"Shrinkage goes from 0 to 1 (a diagonal Gram); got {self.shrink}.")
        if not 0 <= self.correction <= 1:
            raise ValueError(f"A correction goes from 0 (none) to 1; got {self.correction}.")
        if self.block < 1:
            raise ValueError(f"A block has at least 1 column; got {self.block}.")

    @property
    def observers(self) -> tuple[Gram | Drift, ...]:
        return (Gram(), Drift()) if self.correction else (Gram(),)

    def run(
        self,
        w: Float[Array, "*stack n k"],
        statistics: Mapping[str, Any],
        scheme: Scheme,
    ) -> Chosen:
        """Codes and scales of `w` in matrix form, for inputs whose Gram matrix is
        `statistics["gram"]`, `[*stack, k, k]`, times any positive number.

        Stacked weights are taken one after the other. Nothing is compiled twice for one shape.

        **Raises:** `ValueError` if the Gram matrix is missing, misshapen or not finite, if the
        weight is not, if tiles do not fill its axes, or if its scales cannot be searched for.
        """
        gram = _gram_of(w, statistics)
        if self.search is not None:
            check_searchable(scheme)
        drift = statistics.get("drift") if self.correction else None
        chosen, health = gptq(w, gram, scheme, self, drift)
        notes = told(health, self.damping)
        if self.correction and drift is None:
            notes += ("what earlier levels did to its inputs is not known, and not made up for",)
        return dataclasses.replace(chosen, notes=notes)


@functools.partial(jax.jit, static_argnames=("scheme", "how"))
def gptq(
    w: Float[Array, "*stack n k"],
    gram: Float[Array, "*stack k k"],
    scheme: Scheme,
    how: GPTQ,
    drift: Float[Array, "*stack k k"] | None = None,
) -> tuple[Chosen, Health]:
    """What `GPTQ.run` computes, as a pure function: for use in `jit`, without any check."""
    one = functools.partial(_gptq, scheme=scheme, how=how)
    if w.ndim == 2:
        return one(w, gram, drift)
    stack = w.shape[:-2]
    given = (w, gram) if drift is None else (w, gram, drift)
    flat = tuple(x.reshape(-1, *x.shape[-2:]) for x in given)
    found = lax.map(lambda each: one(*each), flat)
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), found)


def _gptq(
    w: Float[Array, "n k"],
    gram: Float[Array, "k k"],
    drift: Float[Array, "k k"] | None = None,
    *,
    scheme: Scheme,
    how: GPTQ,
) -> tuple[Chosen, Health]:
    n, k = w.shape
    w = w.astype(jnp.float32)
    gram = gram.astype(jnp.float32)
    rows, width = tile_shape((n, k), scheme.tile, contracted=(1,))
    solved = jnp.asarray(True)
    if drift is not None:
        more, solved = made_up(w, gram, drift, how.damping)
        w = w + np.float32(how.correction) * more
    plain = quantize_array(w, scheme, contracted=(1,))
    # Scales that lie in one range with each other are made before any of them is used.
    given = width >= k or how.order is Order.STATIC or isinstance(scheme.scale, Scheme)
    given = given or how.search is not None
    runs = panels(k, k if given else width, how.block)
    diagonal = jnp.diagonal(gram)
    mean = diagonal.mean()
    mean = jnp.where(mean == 0, 1.0, mean)
    permutation = _order(diagonal, width, how.order)
    places = runs.places()[::-1]
    factor, used = damped_factor(
        _arranged(gram, diagonal, mean, places, permutation, how), mean, how.damping
    )
    values = w if plain.offset is None else w - plain.offset
    columns = _gathered(values.T, places, permutation)
    held = plain
    if how.search is not None:
        scale, zero = searched(w, diagonal + how.damping * mean, scheme, how.search)
        held = dataclasses.replace(plain, scale=scale, zero_point=zero)
    if given:
        by: Any = _given(held, places, permutation, n, rows, width)
    else:
        by = _in_turn(runs, scheme, n, rows)
    errors, codes, kept = round_columns(factor, columns, panels=runs, format=scheme.values, by=by)
    # Where each column of the order lies among the slots.
    slot_of = np.argsort(np.where(places < 0, k, places), kind="stable")[:k]
    own = slot_of if permutation is None else jnp.asarray(slot_of)[jnp.argsort(permutation)]
    permuted = how.order is Order.DESCENDING and not given
    codes = codes[slot_of if permuted else own].T
    if given:
        scale, zero = held.scale, held.zero_point
    else:
        scale, zero = _parts(
            kept, scheme, permutation if how.order is Order.GROUPED else None, width
        )
    chosen = Chosen(
        codes=codes,
        scale=scale,
        zero_point=zero,
        offset=plain.offset,
        permutation=permutation.astype(jnp.int32) if permuted and permutation is not None else None,
    )
    if how.measured:
        chosen = dataclasses.replace(
            chosen,
            losses=gram_losses(errors[own].T, gram),
            plain_losses=gram_losses(w - dequantize(plain, jnp.float32), gram),
        )
    return chosen, Health(
        weight_finite=jnp.isfinite(w).all(),
        gram_finite=jnp.isfinite(gram).all(),
        damping=used,
        dead=(diagonal == 0).sum(),
        solved=solved,
    )


def gram_losses(errors: Float[Array, "n k"], gram: Float[Array, "k k"]) -> Float[Array, " n"]:
    """`e H e^T` for each row `e`: what outputs err by, squared and added up over all inputs."""
    return (jnp.matmul(errors, gram, precision=lax.Precision.HIGHEST) * errors).sum(axis=1)


def _order(diagonal: Float[Array, " k"], width: int, order: Order) -> Int[Array, " k"] | None:
    """The columns in the order in which they are rounded; `None` as they lie."""
    if order is Order.STORED:
        return None
    if order is not Order.GROUPED:
        return jnp.argsort(-diagonal, stable=True)
    whole = len(diagonal) // width * width
    # The last group, if it is a short one, stays the last.
    body, rest = -diagonal[:whole].reshape(-1, width), -diagonal[whole:]
    within = jnp.argsort(body, axis=1, stable=True)
    groups = jnp.argsort(body.min(axis=1), stable=True)
    ordered = (groups[:, None] * width + within[groups]).reshape(-1)
    return jnp.concatenate([ordered, whole + jnp.argsort(rest, stable=True)])


def _gathered(
    x: Float[Array, "k n"], places: np.ndarray, permutation: Int[Array, " k"] | None
) -> Float[Array, "s n"]:
    """The rows of `x` in their slots, 0 in empty ones."""
    if permutation is None and np.array_equal(places, np.arange(len(x))[::-1]):
        return x[::-1]
    index = np.maximum(places, 0)
    rows = x[index if permutation is None else permutation[index]]
    return rows if (places >= 0).all() else jnp.where((places >= 0)[:, None], rows, 0.0)


def _arranged(
    gram: Float[Array, "k k"],
    diagonal: Float[Array, " k"],
    mean: Float[Array, ""],
    places: np.ndarray,
    permutation: Int[Array, " k"] | None,
    how: GPTQ,
) -> Float[Array, "s s"]:
    """The Gram matrix by slots, with the mean on the diagonal for dead columns and empty slots."""
    # By rows twice, which is faster than by rows and columns; it is symmetric.
    half = _gathered(gram, places, permutation)
    whole = _gathered(half.T, places, permutation)
    if how.shrink > 0:
        whole = whole * np.float32(1 - how.shrink)
    own = _gathered(diagonal[:, None], places, permutation)[:, 0]
    own = jnp.where(own == 0, mean, own)
    return jnp.where(jnp.eye(len(own), dtype=bool), own, whole)


def _given(
    plain: QArray,
    places: np.ndarray,
    permutation: Int[Array, " k"] | None,
    n: int,
    rows: int,
    width: int,
) -> Given:
    """The grids that rounding to nearest has, and which of them each slot has."""

    def by_group(part: Float[Array, "tn tk"]) -> Float[Array, "tk n"]:
        return spread(part.T, (1, rows), (part.shape[1], n))

    zero = plain.zero_point
    zero = None if zero is None else by_group(zero.astype(jnp.float32))
    real = plain.scheme.real_zero_point
    grids = Grid(scale=by_group(scale_values(plain)), zero=zero, real=real)
    index = np.maximum(places, 0)
    column = jnp.asarray(index) if permutation is None else permutation[index]
    return Given(grids=grids, of_slot=column // width)


def _in_turn(runs: Panels, scheme: Scheme, n: int, rows: int) -> InTurn:
    """Grids by the range rule of the scheme, of columns as they are when their turn comes."""
    tiles = -(-n // rows)

    def parts(w: Float[Array, "g n"]) -> Any:
        scale, low = wanted_scale(w, scheme, (len(w), rows))
        assert isinstance(scheme.scale, Format)
        held = stored_scale(scale, scheme.scale).astype(jnp.float32)
        if low is None:
            return held[0], None
        assert scheme.zero_point is not None
        zero = stored_zero_point(zero_point_of(low, held, scheme.values), scheme.zero_point)
        return held[0], zero[0].astype(jnp.float32)

    def choose(turn: Any, mended: Float[Array, "s n"]) -> tuple[Grid, Any]:
        # The first columns to be rounded are the last ones of a run.
        whole = mended[len(mended) - runs.width :]
        if runs.last == runs.width:
            kept = parts(whole)
        else:
            kept = lax.cond(
                turn == runs.groups - 1,
                lambda: parts(whole[runs.width - runs.last :]),
                lambda: parts(whole),
            )
        scale, zero = (
            None if part is None else spread(part[None], (1, rows), (1, n))[0] for part in kept
        )
        assert scale is not None
        return Grid(scale=scale, zero=zero, real=scheme.real_zero_point), kept

    none = jnp.zeros((runs.groups, tiles), jnp.float32)
    return InTurn(choose=choose, empty=(none, None if scheme.zero_point is None else none))


def _parts(
    kept: Any, scheme: Scheme, permutation: Int[Array, " k"] | None, width: int
) -> tuple[Shaped[Array, "tn tk"], Shaped[Array, "tn tk"] | None]:
    """Scales and zero points as they are stored, from those of each turn."""
    scale, zero = kept
    if permutation is not None:
        back = jnp.argsort(permutation[::width] // width)
        scale, zero = scale[back], None if zero is None else zero[back]
    assert isinstance(scheme.scale, Format)
    held = stored_scale(scale.T, scheme.scale)
    if zero is None:
        return held, None
    assert scheme.zero_point is not None
    return held, stored_zero_point(zero.T, scheme.zero_point)


def _gram_of(w: Float[Array, "*stack n k"], statistics: Mapping[str, Any]) -> Any:
    k = w.shape[-1]
    if "gram" not in statistics:
        raise ValueError(
            f"GPTQ needs the Gram matrix of a site's inputs; got statistics {[*statistics]}. "
            "Observe the site with Gram()."
        )
    gram = statistics["gram"]
    if tuple(gram.shape) != (*w.shape[:-2], k, k):
        raise ValueError(
            f"A weight of shape {tuple(w.shape)} in matrix form has a Gram matrix of shape "
            f"{(*w.shape[:-2], k, k)}; got {tuple(gram.shape)}."
        )
    return gram
