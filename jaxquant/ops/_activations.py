"""Quantizing what flows through a model, at the moment it is used."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Shaped

from ..qarray import QArray, Scheme
from ..qarray._quantize import quantize_array, quantize_with


def quantize_activation(
    x: Float[Array, "..."],
    scheme: Scheme,
    *,
    contracted: tuple[int, ...],
    stack: tuple[int, ...] = (),
) -> QArray:
    """Rounds `x` to `scheme` with ranges taken from `x` itself ("dynamic").

    **Raises:** `TypeError` when differentiated: rounding has gradient 0 almost everywhere, and a
    model trained on that would learn nothing from what stands before this site.
    """

    return _without_gradient(
        lambda x: quantize_array(x, scheme, contracted=contracted, stack=stack), x, scheme
    )


def quantize_static(
    x: Float[Array, "..."],
    scheme: Scheme,
    scale: Float[Array, "..."],
    zero_point: Shaped[Array, "..."] | None = None,
    *,
    contracted: tuple[int, ...],
    stack: tuple[int, ...] = (),
) -> QArray:
    """Rounds `x` to `scheme` with ranges that are known before ("static"): one entry a tile.

    **Raises:** `ValueError` where they do not fit; `TypeError` when differentiated.
    """
    return _without_gradient(
        lambda x: quantize_with(x, scheme, scale, zero_point, contracted=contracted, stack=stack),
        x,
        scheme,
    )


def undifferentiated(x: Float[Array, "..."], scheme: Scheme) -> Float[Array, "..."]:
    """`x` itself, for what rounds it to `scheme` later: differentiated, it raises the same."""
    return _without_gradient(lambda x: x, x, scheme)


def _without_gradient(function: Callable[[Any], Any], x: Any, scheme: Scheme) -> Any:
    @jax.custom_jvp
    def rounded(x: Any) -> Any:
        return function(x)

    @rounded.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise TypeError(
            f"This recipe quantizes activations ({scheme}), and in mode infer rounding has no "
            "useful gradient. Differentiate in mode simulate (quantization-aware training), or "
            "use a weight-only recipe."
        )

    return rounded(x)
