"""The only file that imports Pallas, whose names move between releases of JAX."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.pallas import (
    BlockSpec as BlockSpec,
    ds as ds,
    num_programs as num_programs,
    pallas_call as _pallas_call,
    program_id as program_id,
    when as when,
)
from jax.experimental.pallas.tpu import (
    bitcast as bitcast,
    CompilerParams as _TPUCompilerParams,
    PrefetchScalarGridSpec as _PrefetchScalarGridSpec,
    VMEM as VMEM,
)


def tpu_call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    semantics: Sequence[str],
    in_specs: Sequence[Any],
    out_specs: Any,
    out_shape: Any,
    scratch: Sequence[Any],
    chosen: Any = None,
    vmem_bytes: int | None,
    interpret: bool,
) -> Callable[..., Any]:
    """`pallas_call` as Mosaic's TPU compiler takes it; `interpret` runs it step by step anywhere.

    `semantics` says of each axis of the grid whether its steps are "parallel" or depend on each
    other ("arbitrary"). `vmem_bytes` is what the compiler may use of a core's vector memory.
    `chosen` are integers that the index functions of the specs are given last; kernels do not see
    them.
    """
    params = _TPUCompilerParams(dimension_semantics=tuple(semantics), vmem_limit_bytes=vmem_bytes)
    where: dict[str, Any] = {"compiler_params": params, "interpret": interpret, "name": name}
    if chosen is None:
        return _pallas_call(
            kernel,
            grid=grid,
            in_specs=list(in_specs),
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=list(scratch),
            **where,
        )
    spec = _PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=grid,
        in_specs=list(in_specs),
        out_specs=out_specs,
        scratch_shapes=list(scratch),
    )
    call = _pallas_call(
        lambda _, *refs: kernel(*refs), grid_spec=spec, out_shape=out_shape, **where
    )
    return lambda *operands: call(chosen, *operands)


def interpreted(kernel: Callable[..., None], out_shape: Any) -> Callable[..., Any]:
    """A kernel of one step on whole arrays, interpreted: for tests of its parts."""
    return _pallas_call(kernel, out_shape=out_shape, interpret=True)
