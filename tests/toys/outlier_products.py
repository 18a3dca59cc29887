"""Products with outliers: axes in all orders, a few columns far larger than the rest."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from quantized import normal, SCHEMES

from jaxquant.ops import Outliers
from jaxquant.ops.dot._api import make_call
from jaxquant.ops.outliers._call import OutlierCall
from jaxquant.qarray import quantize_array

INT8 = SCHEMES["int8 channel"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes of activations and weight, and which axes are summed and batched; `x` on the left."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    summed: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    flipped: bool = False
    weights: str = "int8 channel"


CASES = {
    "matrix": Case(x=(6, 64), w=(64, 8), summed=((1,), (0,))),
    "tokens": Case(x=(2, 3, 64), w=(64, 4, 2), summed=((2,), (0,))),
    "weight on the left": Case(x=(6, 64), w=(8, 64), summed=((1,), (1,)), flipped=True),
    "several axes": Case(x=(6, 8, 4), w=(4, 8, 5), summed=((2, 1), (0, 1))),
    "batched": Case(x=(6, 3, 32), w=(3, 32, 8), summed=((2,), (1,)), batch=((1,), (0,))),
    "int4 zero": Case(x=(6, 64), w=(64, 8), summed=((1,), (0,)), weights="int4 zero g64"),
    "e4m3": Case(x=(6, 64), w=(64, 8), summed=((1,), (0,)), weights="e4m3 channel"),
}


def call_of(name, outliers=None, *, known=0, seed=0):
    """The call of a case; `known` are how many columns have their original weights."""
    case = CASES[name]
    w = normal(*case.w, seed=seed)
    x = np.array(normal(*case.x, seed=seed + 1))
    k = math.prod(case.x[a] for a in case.summed[0])
    last = case.summed[0][-1]
    # Two places along the last axis that is summed, in some rows only.
    index = [slice(None)] * x.ndim
    index[0] = slice(0, 2)
    for place, factor in ((1, 20.0), (3, -9.0)):
        index[last] = place
        x[tuple(index)] *= factor
    x[(0,) * x.ndim] = 100.0
    scheme = SCHEMES[case.weights]
    q = quantize_array(w, scheme, contracted=case.summed[1], stack=case.batch[1])
    activations = INT8 if scheme.values.integer else SCHEMES["e4m3 channel"]
    numbers = (case.summed, case.batch)
    lhs, rhs = jnp.asarray(x), q
    if case.flipped:
        lhs, rhs = rhs, lhs
        numbers = tuple(pair[::-1] for pair in numbers)
    columns = originals = None
    if known:
        rng = np.random.default_rng(seed)
        lead = [case.w[a] for a in case.batch[1]]
        columns = np.stack([rng.permutation(k)[:known] for _ in range(math.prod(lead))])
        columns[:, 0], columns[:, -1] = 0, k
        free = [a for a in range(len(case.w)) if a not in case.summed[1] + case.batch[1]]
        m = np.asarray(w).transpose([*case.batch[1], *case.summed[1], *free])
        m = m.reshape(len(columns), k, -1)
        m = np.concatenate([m, 0 * m[:, :1] + 7], axis=1)
        originals = np.take_along_axis(m, columns[..., None], axis=1)
        columns = jnp.asarray(columns.reshape(*lead, known))
        originals = jnp.asarray(originals.reshape(*lead, known, -1))
    return OutlierCall(
        dot=make_call(lhs, rhs, numbers),
        activations=activations,
        outliers=outliers or Outliers(),
        columns=columns,
        originals=originals,
    )
