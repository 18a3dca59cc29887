"""The only file that imports Pallas, whose names move between releases of JAX."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import (
    BlockSpec as BlockSpec,
    CostEstimate as _CostEstimate,
    ds as ds,
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
from jax.extend.core import jaxpr_as_fun

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
    named: Any = tuple(semantics)
    params = _TPUCompilerParams(dimension_semantics=named, vmem_limit_bytes=vmem_bytes)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a kernel's grid moves between the main memory and its blocks.

    `bytes` are those of all steps; `first` are those that the first step waits for.
    """

    name: str
    bytes: int
    first: int


def traffic(jaxpr: Any, cores: int = 1) -> tuple[Traffic, ...]:
    """What the kernels of a jaxpr move. A block that comes in neighbouring steps is moved once.

    Steps along the first axis are dealt out to `cores` in runs, where they divide it. Only of grids
    whose sizes and blocks the jaxpr tells, as those of `tpu_call`, and none is read from memory.

    **Raises:** `ValueError` for a block that lies outside of its array, which a chip would read and
    write all the same, and which no interpreter notices.
    """
    found = []
    for eqn in _kernels(jaxpr):
        grids = eqn.params["grid_mapping"]
        if grids.num_index_operands:
            continue
        steps = np.indices(grids.grid).reshape(len(grids.grid), -1)
        count = steps.shape[1]
        cut = cores if grids.grid and grids.grid[0] % cores == 0 else 1
        starts = np.arange(count) % (count // cut) == 0
        moved, first = 0, 0
        for position, block in enumerate(grids.block_mappings):
            sizes, new = _blocks(block, steps)
            moved += int(sizes[new | starts].sum())
            if position < grids.num_inputs:
                first += int(sizes[starts].sum())
        found.append(Traffic(name=eqn.params["name"], bytes=moved, first=first))
    return tuple(found)


def _kernels(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
            continue
        for value in itertools.chain.from_iterable(
            v if isinstance(v, tuple | list) else (v,) for v in eqn.params.values()
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _kernels(inner)


def _blocks(block: Any, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the block of each step, cut where the array ends; and whether it is a new one."""
    index = jaxpr_as_fun(block.index_map_jaxpr)
    # What is jitted inside was traced for devices that may not be here.
    with jax.ensure_compile_time_eval(), jax.disable_jit():
        found = jax.vmap(lambda *at: tuple(index(*at)))(*(np.int32(axis) for axis in steps))
    indices, array = np.stack([np.asarray(each) for each in found]), block.array_aval
    sizes = np.ones(steps.shape[1], np.int64)
    for at, part, whole in zip(indices, block.block_shape, array.shape, strict=True):
        # A block that takes one of an axis away has no size there.
        size = getattr(part, "block_size", part) or 1
        if at.min() < 0 or at.max() * size >= whole:
            raise ValueError(
                f"A kernel reads blocks {at.min()} to {at.max()} of {size} along an axis of "
                f"{whole}, which ends before: memory of others. Correct its index map."
            )
        sizes = sizes * np.minimum(size, whole - at * size)
    new = np.ones(steps.shape[1], bool)
    new[1:] = (indices[:, 1:] != indices[:, :-1]).any(axis=0)
    integer = jnp.issubdtype(array.dtype, jnp.integer)
    limits = jnp.iinfo(array.dtype) if integer else jnp.finfo(array.dtype)
    return sizes * limits.bits // 8, new
