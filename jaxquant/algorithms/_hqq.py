"""Half-quadratic quantization: zero points, and perhaps scales, that a robust error asks for."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..numerics import encode, Format
from ..numerics._scale import offset_by
from ..qarray import quantize_array, Scheme
from ..qarray._qarray import short_tiles
from ..qarray._quantize import stored_scale, stored_zero_point
from ._matrix import Chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class HQQ:
    """Data-free codes whose error has a small `|e| ** power` (Badri and Shaji 2023, HQQ).

    The error is split into a sparse part `u` and a rest, and both are found in turn: of `e = w -
    dequantize(codes)` the part `u = sign(e) max(|e| - |e|^(power - 1) / beta, 0)` is left out, and
    the zero point becomes the mean of `codes - (w - u) / scale` over the tile; `beta` grows by
    `growth` a step. The defaults are those of the reference.

    `beta` is in units of the weights, as in the reference. Weights of usual size (0.02) have errors
    so small that `u` is 0, and the step is that of least squares.

    The reference moves zero points alone. With `refit_scale` each step takes the scale from least
    squares too, which takes a seventh off the squared error of 3 bits and 37% off that of 2.

    With `round_zero` it starts from zero points that are codes, as the reference does for 4 bits:
    0 is on the grid, and stays near it. Squared errors are a little larger, and models are better
    for it, in 3 bits by far (`docs/algorithms/hqq.md`).

    Unlike in the reference, each tile keeps the step at which its mean magnitude of error was
    least, with scale and zero point as the scheme stores them: no tile is worse than at the start.
    Where zero points are codes, and scales stay, that is what comes out: give the scheme a real one
    (`zero_point=FLOAT16`).
    """

    power: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    iterations: int = 20
    refit_scale: bool = False
    round_zero: bool = True
    name: str = dataclasses.field(default="hqq", init=False)

    def __post_init__(self) -> None:
        good = 0 < self.power <= 1 and self.beta > 0 and self.growth > 0 and self.iterations >= 1
        if not good:
            raise ValueError(
                "HQQ takes 0 < power <= 1, beta > 0, growth > 0 and at least one iteration; got "
                f"{self}."
            )

    @property
    def observers(self) -> tuple[()]:
        """No statistics of inputs are needed."""
        return ()

    def run(
        self,
        w: Float[Array, "*stack n k"],
        statistics: Mapping[str, Any],
        scheme: Scheme,
    ) -> Chosen:
        """Codes, scales and zero points of `w`; `statistics` are not looked at.

        **Raises:** `ValueError` for schemes without zero points or that hold scales as codes, and
        where tiles do not fill the matrix.
        """
        check_scheme(scheme)
        return _solve(w, scheme, self)


def check_scheme(scheme: Scheme) -> None:
    """**Raises:** `ValueError` where there are no zero points to find."""
    if scheme.zero_point is None:
        raise ValueError(
            f"HQQ finds zero points, and the scheme {scheme} has none. Give it one: "
            "zero_point=FLOAT16 with range=MinMax(), or use another algorithm."
        )
    if isinstance(scheme.scale, Scheme) or scheme.centered:
        raise ValueError(
            f"HQQ finds zero points beside plain scales; the scheme {scheme} holds scales as codes "
            "or takes a mean off. Use scale=FLOAT16 or BFLOAT16."
        )


@functools.partial(jax.jit, static_argnames=("scheme", "how"))
def _solve(w: Float[Array, "*stack n k"], scheme: Scheme, how: HQQ) -> Chosen:
    *stack, n, k = w.shape
    start = quantize_array(
        w.astype(jnp.float32), scheme, contracted=(-1,), stack=tuple(range(len(stack)))
    )
    rows, columns = start.tile[-2:]
    if short_tiles(w.shape, start.tile):
        raise ValueError(
            f"HQQ takes tiles that fill the matrix; those of {rows}x{columns} do not fill {n}x{k}. "
            "Use a divisor, or another algorithm for this weight."
        )
    x = w.astype(jnp.float32).reshape(*stack, n // rows, rows, k // columns, columns)
    wide = tuple(len(stack) + a for a in (1, 3))
    scale, zero = (
        jnp.expand_dims(part.astype(jnp.float32), wide) for part in (start.scale, start.zero_point)
    )
    zero = jnp.round(zero) if how.round_zero else zero
    stored = functools.partial(_stored, scheme)

    def held(scale: Any, zero: Any) -> tuple[Any, Any]:
        return tuple(part.astype(jnp.float32) for part in stored(scale, zero))

    def step(i: Any, state: Any) -> Any:
        scale, zero, beta, (least, *kept) = state
        used = held(scale, zero)
        codes = _codes(x, scheme, *used)
        off = x - (codes - used[1]) * used[0]
        error = jnp.abs(off).mean(axis=wide, keepdims=True)
        better = error < least
        kept = [jnp.where(better, now, old) for now, old in zip(used, kept, strict=True)]
        # Errors below this have no sparse part, and a power costs more than all the rest.
        some = jnp.abs(off).max(initial=0.0) > beta ** (1 / (how.power - 2))
        scale, zero = lax.cond(
            some,
            lambda: _next(x - _sparse(off, beta, how.power), codes, used[0], wide, how.refit_scale),
            lambda: _next(x, codes, used[0], wide, how.refit_scale),
        )
        return scale, zero, beta * how.growth, (jnp.minimum(error, least), *kept)

    first = (jnp.full_like(scale, jnp.inf), scale, zero)
    state = (scale, zero, jnp.float32(how.beta), first)
    # One more look than there are steps: the result of the last is measured too.
    _, _, _, (_, scale, zero) = lax.fori_loop(0, how.iterations + 1, step, state)
    codes = encode(_codes(x, scheme, scale, zero).reshape(w.shape), scheme.values)
    scale, zero = stored(jnp.squeeze(scale, wide), jnp.squeeze(zero, wide))
    return Chosen(codes=codes, scale=scale, zero_point=zero)


def _stored(scheme: Scheme, scale: Any, zero: Any) -> tuple[Any, Any]:
    """Scale and zero point in the scheme's formats."""
    assert isinstance(scheme.scale, Format) and scheme.zero_point is not None
    return stored_scale(scale, scheme.scale), stored_zero_point(zero, scheme.zero_point)


def _codes(x: Any, scheme: Scheme, scale: Any, zero: Any) -> Any:
    """The nearest codes, as `quantize_array` chooses them, in float32."""
    shifted = x * (1 / scale)
    shifted = offset_by(shifted, zero) if scheme.real_zero_point else jnp.round(shifted) + zero
    return jnp.round(jnp.clip(shifted, scheme.values.lowest, scheme.values.highest))


def _sparse(off: Any, beta: Any, power: float) -> Any:
    size = jnp.abs(off)
    return jnp.sign(off) * jnp.maximum(size - size ** (power - 1) / beta, 0)


def _next(
    target: Any, codes: Any, scale: Any, axes: tuple[int, ...], refit: bool
) -> tuple[Any, Any]:
    """Scale and zero point with which `codes` are nearest to `target` in squared error."""
    if refit:
        middle = codes.mean(axis=axes, keepdims=True)
        spread = ((codes - middle) ** 2).mean(axis=axes, keepdims=True)
        together = ((codes - middle) * target).mean(axis=axes, keepdims=True)
        # Codes that are all one number, or that fall as the target rises, say nothing of a scale.
        fits = (spread > 0) & (together > 0)
        scale = jnp.where(fits, together / jnp.where(fits, spread, 1.0), scale)
    return scale, (codes - target / scale).mean(axis=axes, keepdims=True)
