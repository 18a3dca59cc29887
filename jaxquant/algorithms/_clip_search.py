"""Clip search: ranges of weight groups, narrowed where the group's partial output gains by it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..intercept import Gram
from ..qarray import dequantize, QArray, quantize_array, Scheme
from ._matrix import Chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipSearch:
    """For each row and group of a weight, the factor of its peak at which values are cut.

    Of the factors `1 - i / grid` for `i < shrink * grid`, that with the least squared error of the
    group's partial output `x_g . w_g`; the widest of equals (`auto_clip` of AWQ, Lin et al. 2024,
    arXiv:2306.00978: 1.0 to 0.55). Sums over tokens are taken once, as the Gram matrix: the error
    is `d^T G_gg d`, where `d` is what rounding moves and `G_gg` the group's block of `G = x^T x`.

    Partial outputs leave out what groups add to each other. With `checked`, a row whose whole error
    `d^T G d` became larger than without clipping stays as it was; the reference does not look.

    Queries and keys are not clipped by the reference: a recipe leaves them out by a rule.
    """

    grid: int = 20
    shrink: float = 0.5
    checked: bool = True
    name: str = dataclasses.field(default="clip_search", init=False)

    def __post_init__(self) -> None:
        if self.grid < 1 or not 0 < self.shrink <= 1:
            raise ValueError(f"A clip search takes grid >= 1 and 0 < shrink <= 1; got {self}.")

    @property
    def factors(self) -> tuple[float, ...]:
        """From the widest to the narrowest."""
        return tuple(1 - i / self.grid for i in range(max(1, round(self.shrink * self.grid))))

    @property
    def observers(self) -> tuple[Gram, ...]:
        return (Gram(),)

    def run(
        self, w: Float[Array, "*stack n k"], statistics: Mapping[str, Any], scheme: Scheme
    ) -> Chosen:
        """Clipped and rounded to nearest: codes and scales in matrix form.

        **Raises:** `ValueError` unless the scheme's tiles lie within rows and fill them.
        """
        gram = statistics["gram"]
        cut = clipped(w.astype(jnp.float32), self.limits(w, gram, scheme))
        q = _rounded(cut, scheme)
        return Chosen(codes=q.codes, scale=q.scale, zero_point=q.zero_point, offset=q.offset)

    def limits(
        self, w: Float[Array, "*stack n k"], gram: Float[Array, "*stack k k"], scheme: Scheme
    ) -> Float[Array, "*stack n groups"]:
        """The largest magnitude that each group keeps.

        **Raises:** `ValueError` unless the scheme's tiles lie within rows and fill them.
        """
        _check(scheme, w.shape)
        return _limits(w, gram, scheme, self)

    def limits_from_inputs(
        self, w: Float[Array, "*stack n k"], x: Float[Array, "*stack tokens k"], scheme: Scheme
    ) -> Float[Array, "*stack n groups"]:
        """The same from sampled inputs, all of which are used.

        **Raises:** `ValueError` unless the scheme's tiles lie within rows and fill them.
        """
        x = x.astype(jnp.float32)
        gram = jnp.einsum("...tk,...tl->...kl", x, x, precision=lax.Precision.HIGHEST)
        return self.limits(w, gram, scheme)


@functools.partial(jax.jit, static_argnames="scheme")
def _rounded(w: Any, scheme: Scheme) -> QArray:
    return quantize_array(w, scheme, contracted=(-1,), stack=tuple(range(w.ndim - 2)))


def clipped(
    w: Float[Array, "*stack n k"], limits: Float[Array, "*stack n groups"]
) -> Float[Array, "*stack n k"]:
    """`w` with the values of each group cut at its limit."""
    wide = jnp.repeat(limits, w.shape[-1] // limits.shape[-1], axis=-1)
    return jnp.clip(w, -wide, wide)


def _check(scheme: Scheme, shape: tuple[int, ...]) -> None:
    k, group = shape[-1], scheme.tile.contracted
    if scheme.tile.kept != 1 or (group is not None and k % group):
        raise ValueError(
            f"A clip search cuts groups within rows of {k} values; the scheme {scheme} shares "
            "scales between rows, or its groups do not fill one. Use Tile(contracted=g) with a "
            "divisor of the row, or leave the search out."
        )


@functools.partial(jax.jit, static_argnames=("scheme", "how"))
def _limits(w: Any, gram: Any, scheme: Scheme, how: ClipSearch) -> Any:
    w, gram = w.astype(jnp.float32), gram.astype(jnp.float32)
    *stack, n, k = w.shape
    group = k if scheme.tile.contracted is None else scheme.tile.contracted
    groups = k // group
    blocks = gram.reshape(*stack, groups, group, groups, group)
    blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
    widest = jnp.abs(w).reshape(*stack, n, groups, group).max(axis=-1)

    def moved(limits: Any) -> Any:
        q = quantize_array(
            clipped(w, limits), scheme, contracted=(-1,), stack=tuple(range(len(stack)))
        )
        return dequantize(q) - w

    def partial(limits: Any) -> Any:
        d = moved(limits).reshape(*stack, n, groups, group)
        through = jnp.einsum("...ngi,...gij->...ngj", d, blocks, precision=lax.Precision.HIGHEST)
        return (through * d).sum(axis=-1)

    def step(i: Any, state: Any) -> Any:
        least, kept = state
        limits = widest * factors[i]
        now = partial(limits)
        return jnp.minimum(now, least), jnp.where(now < least, limits, kept)

    factors = jnp.asarray(how.factors, jnp.float32)
    _, limits = lax.fori_loop(1, len(how.factors), step, (partial(widest), widest))
    if not how.checked:
        return limits
    after, before = (row_errors(moved(each), gram) for each in (limits, widest))
    return jnp.where((after <= before)[..., None], limits, widest)


def row_errors(
    d: Float[Array, "*stack n k"], gram: Float[Array, "*stack k k"]
) -> Float[Array, "*stack n"]:
    """`d^T G d` of each row: the squared error of its output, summed over the inputs of `G`."""
    through = jnp.einsum("...nk,...kl->...nl", d, gram, precision=lax.Precision.HIGHEST)
    return (through * d).sum(axis=-1)
