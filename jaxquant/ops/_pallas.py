"""The only file that imports Pallas, whose names move between releases of JAX."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import (
    BlockSpec as BlockSpec,
    CostEstimate as _CostEstimate,
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
from jax.experimental.pallas.triton import (
    CompilerParams as _GPUCompilerParams,
    dot as _gpu_dot,
    elementwise_inline_asm as _inline_asm,
    load as _gpu_load,
    store as _gpu_store,
)

# Of tiles in a kernel for GPUs: a product of two, and what a mask lets through to and from memory.
gpu_dot, gpu_load, gpu_store = _gpu_dot, _gpu_load, _gpu_store


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
    cost: tuple[int, int] | None = None,
    vmem_bytes: int | None,
    interpret: bool,
) -> Callable[..., Any]:
    """`pallas_call` as Mosaic's TPU compiler takes it; `interpret` runs it step by step anywhere.

    `semantics` says of each axis of the grid whether its steps are "parallel" or depend on each
    other ("arbitrary"). `vmem_bytes` is what the compiler may use of a core's vector memory.
    `chosen` are integers that the index functions of the specs are given last; kernels do not see
    them. `cost`, operations and bytes moved, is what XLA plans the kernel with.
    """
    params = _TPUCompilerParams(dimension_semantics=tuple(semantics), vmem_limit_bytes=vmem_bytes)
    where: dict[str, Any] = {"compiler_params": params, "interpret": interpret, "name": name}
    if cost is not None:
        where["cost_estimate"] = _CostEstimate(
            flops=cost[0], bytes_accessed=cost[1], transcendentals=0
        )
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


def gpu_call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    warps: int,
    stages: int,
    interpret: bool,
    in_out: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """`pallas_call` as Triton takes it: whole arrays in global memory, which the kernel indexes.

    `stages` is how many steps of a loop the compiler may have on their way from memory at once.
    `in_out` names arguments whose memory a result takes over.
    """
    return _pallas_call(
        kernel,
        name=name,
        grid=grid,
        out_shape=out_shape,
        compiler_params=_GPUCompilerParams(num_warps=warps, num_stages=stages),
        input_output_aliases=in_out or {},
        interpret=interpret,
    )


def gpu_asm(
    text: str,
    *args: Any,
    dtype: Any,
    pack: int,
    meaning: Callable[..., Any],
    interpret: bool,
) -> Any:
    """One PTX text for each `pack` neighbours of arrays of one shape, in 32-bit registers.

    `$0...` are the registers of the result of `dtype`, then those of the arguments in order.
    `meaning(*args)` says the same in JAX: what `interpret` computes.
    """
    if interpret:
        return meaning(*args)
    sizes = [pack * jnp.dtype(d).itemsize // 4 for d in (dtype, *(a.dtype for a in args))]
    constraints = ["=r"] * sizes[0] + ["r"] * sum(sizes[1:])
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    [result] = _inline_asm(
        text,
        args=args,
        constraints=",".join(constraints),
        pack=pack,
        result_shape_dtypes=[shape],
    )
    return result
