"""The quantized dot: what may be called, and which backend answers."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from ...qarray import CANONICAL, check_qarray, Layout, QArray, Scheme
from .._dispatch import first_willing
from .._target import target_device
from . import _mosaic_tpu, _reference, _triton_gpu, _xla, _xla_cpu
from ._call import DimensionNumbers, DotCall, Layer, Operand

# In order of preference; the reference answers only to its name or when all others refuse.
BACKENDS = {
    "mosaic_tpu": _mosaic_tpu,
    "triton_gpu": _triton_gpu,
    "xla_cpu": _xla_cpu,
    "xla": _xla,
    "reference": _reference,
}
# Named on a CPU these are interpreted, step by step. Unnamed, they are passed by where others win.
KERNELS = ("mosaic_tpu", "triton_gpu")
# Those that read layouts of their own.
LAYOUTS = (_mosaic_tpu, _triton_gpu, _xla_cpu)
_PREFERRED = {"cpu": "xla_cpu", "tpu": "mosaic_tpu", "cuda": "triton_gpu"}


def dot_general(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    *,
    precision: Any = None,
    out_dtype: Any = None,
    sharding: NamedSharding | None = None,
    activations: Scheme | None = None,
    layer: Layer | None = None,
    backend: str | None = None,
) -> Float[Array, "..."]:
    """`jax.lax.dot_general` with a QArray on either side, or both.

    `dimension_numbers` count logical axes. Sums are int32 where both sides hold integers, else
    float32; the result has `out_dtype`, by default the wider of the dtypes that the operands stand
    for. `backend` forces one of `BACKENDS`; `None` takes the first that does not refuse. A kernel
    for another device that is named on a CPU is interpreted there, which is slow, and for tests.

    `sharding` says how the QArray (the right one of two) lies on a mesh, by its logical axes. XLA
    cuts products by itself and does not need it; kernels do, and never gather a weight.

    With `activations` the side that is no QArray is first rounded to that scheme, with ranges of
    its own, as by `quantize_activation`: by the kernel itself where it can, else before. `layer`
    says where the QArray (the right one of two) lies if it is an entry of a stack, in a loop over
    layers: a kernel then reads it there.

    **Raises:** `Refusal` (a `NotImplementedError`) with the reason if the named backend cannot;
    `ValueError` or `TypeError` for operands that are not what they say.
    """
    call = make_call(
        lhs,
        rhs,
        dimension_numbers,
        precision=precision,
        out_dtype=out_dtype,
        sharding=sharding,
        activations=activations,
        layer=layer,
    )
    if backend in KERNELS and call.platform == "cpu":
        call = dataclasses.replace(call, interpret=True)
    name, _ = choose_backend(call, backend)
    chosen = BACKENDS[name]
    return chosen.run(call if _rounds(chosen, call) else call.rounded())


def make_call(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    *,
    precision: Any = None,
    out_dtype: Any = None,
    sharding: NamedSharding | None = None,
    activations: Scheme | None = None,
    layer: Layer | None = None,
) -> DotCall:
    """Checks the operands and fills in what was left out."""
    for operand in (lhs, rhs):
        if isinstance(operand, QArray):
            check_qarray(operand)
    (left_sum, right_sum), (left_batch, right_batch) = dimension_numbers
    contracted = tuple(left_sum), tuple(right_sum)
    batch = tuple(left_batch), tuple(right_batch)
    for left, right in zip(contracted[0] + batch[0], contracted[1] + batch[1], strict=True):
        if lhs.shape[left] != rhs.shape[right]:
            raise ValueError(
                f"Axis {left} of the left side has {lhs.shape[left]} elements and axis {right} of "
                f"the right side {rhs.shape[right]}; they are summed or batched together and must "
                f"agree. Shapes: {tuple(lhs.shape)} and {tuple(rhs.shape)}."
            )
    if activations is not None and isinstance(lhs, QArray) == isinstance(rhs, QArray):
        both = "both are" if isinstance(lhs, QArray) else "neither is"
        raise ValueError(
            f"`activations={activations}` rounds the side that is no QArray, where the other one "
            f"is; here {both}. Leave it out, or quantize the weight."
        )
    return DotCall(
        lhs=lhs,
        rhs=rhs,
        contracted=contracted,
        batch=batch,
        precision=precision,
        out_dtype=np.dtype(out_dtype or jnp.promote_types(lhs.dtype, rhs.dtype)),
        device=target_device(),
        sharding=sharding,
        activations=activations,
        layer=layer,
    )


def choose_backend(call: DotCall, named: str | None = None) -> tuple[str, dict[str, str]]:
    """The backend that `dot_general` would run for `call`, and why those before it did not.

    A kernel is passed by where it would run but is not faster; named, it runs there too.
    """

    rounded = call.rounded_shapes()

    def refuses(backend: Any) -> str | None:
        seen = call if _rounds(backend, call) else rounded
        reason = backend.refuses(seen)
        if reason is None and named is None and hasattr(backend, "loses"):
            return backend.loses(seen)
        return reason

    return first_willing("dot", BACKENDS, refuses, named)


def preferred_backend() -> str:
    """The backend whose layouts suit the device in force (`target_device`)."""
    return _PREFERRED.get(target_device().platform, "xla")


def _rounds(backend: Any, call: DotCall) -> bool:
    """Whether a backend does by itself what `call.activations` asks for."""
    return call.activations is not None and hasattr(backend, "rounds") and backend.rounds(call)


def layout_for(
    backend: str, w: QArray, contracted: tuple[int, ...], stack: tuple[int, ...]
) -> Layout:
    """The layout in which `backend` reads a weight whose logical axes play the given roles."""
    chosen = BACKENDS[backend]
    return chosen.layout_for(w, contracted, stack) if chosen in LAYOUTS else CANONICAL


def dot(x: Operand, w: Operand, *, backend: str | None = None) -> Float[Array, "..."]:
    """`x @ w` over the last axis of `x` and the first of `w`."""
    numbers = (((len(x.shape) - 1,), (0,)), ((), ()))
    return dot_general(x, w, numbers, backend=backend)
