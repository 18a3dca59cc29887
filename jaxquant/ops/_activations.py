"""Quantizing what flows through a model, at the moment it is used."""

from typing import Any

import jax
from jaxtyping import Array, Float

from ..qarray import QArray, Scheme
from ..qarray._quantize import quantize_array


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

    @jax.custom_jvp
    def rounded(x: Any) -> QArray:
        return quantize_array(x, scheme, contracted=contracted, stack=stack)

    @rounded.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise TypeError(
            f"This recipe quantizes activations ({scheme}), and in mode infer rounding has no "
            "useful gradient. Differentiate in mode simulate (quantization-aware training), or "
            "use a weight-only recipe."
        )

    return rounded(x)
