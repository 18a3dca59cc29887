"""Dots compiled for chips that are not here: what became of each, and what its schedule says."""

import concurrent.futures
import dataclasses
import enum
import multiprocessing
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..aot import compile_for, Compiled, CudaKernel, mesh_for, Program, Target
from ..numerics import Format
from ..ops import Refusal
from ..ops._pallas import Traffic, traffic
from ..ops.dot import dot_general, layout_for
from ..ops.dot._cases import Case
from ..qarray import abstract_qarray, dequantize, QArray, relayout, Scheme

_VMEM = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)'
)

# What Pallas's lowering, Mosaic, Triton and XLA raise where they cannot compile.
_FAILURES = (ValueError, TypeError, NotImplementedError, AssertionError, LookupError, RuntimeError)


class Status(enum.Enum):
    """What became of a call."""

    COMPILED = "compiled"
    REFUSED = "refused"
    """By the backend, with a reason."""
    FAILED = "FAILED"
    """By the compiler, though the backend did not refuse: a defect."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cycles:
    """Bundles of a whole program: one a cycle, when nothing stalls.

    `exact` counts code under a condition as often as the condition holds; `bound` in every step.
    They are equal where the program is no kernel whose conditions are known. `step` are the bundles
    of one step of the longest loop, `set_up` those that only the first tile of columns needs.
    """

    exact: int
    bound: int
    step: int
    steps: int
    set_up: int
    spills: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What a compiled program says. Seconds follow from the target's clock and bandwidth.

    `hbm_bytes` are moved between the main memory and the chip; `on_chip_bytes` are those of arrays
    that XLA keeps on the chip; `accessed_bytes` is XLA's own count, which is both (of kernels, what
    they say). `first_bytes` are waited for before the first step. `temporary_bytes` of the main
    memory hold what the program makes on its way.
    """

    hbm_bytes: int
    on_chip_bytes: int
    accessed_bytes: float
    first_bytes: int
    temporary_bytes: int
    vmem_bytes: int | None
    cycles: Cycles | None
    known: bool
    kernels: tuple[dict[str, Any], ...] = ()
    """Of a CUDA program, each kernel: see `_cuda_kernel`."""
    library_calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """How often a CUDA program calls libraries (cuBLAS), whose kernels are not known here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    status: Status
    reason: str = ""
    figures: Figures | None = None


def operands(case: Case, backend: str) -> tuple[jax.ShapeDtypeStruct, QArray]:
    """Shapes of the activations `[rows, k]` and of the weight `[k, n]` as `backend` reads it."""
    k, n = case.linear.k, case.linear.n
    w = abstract_qarray((k, n), case.dtype, case.scheme, contracted=(0,))
    layout = layout_for(backend, w, (0,), ())
    w = jax.eval_shape(lambda w: relayout(w, layout), w)
    return jax.ShapeDtypeStruct((case.rows, k), case.dtype), w


def needed_bytes(case: Case) -> int:
    """Bytes of codes, scales, zero points, activations and output: each once, as it is stored."""
    total = _held_bytes(operands(case, "reference")[1], case.scheme)
    elements = case.rows * (case.linear.k + case.linear.n)
    return total + elements * jnp.dtype(case.dtype).itemsize


def _held_bytes(q: QArray, scheme: Scheme) -> int:
    def size(array: Any, held: Format) -> int:
        return -(-array.size * held.bits // 8)

    assert isinstance(scheme.scale, Format)
    total = size(q.codes, scheme.values) + size(q.scale, scheme.scale)
    if scheme.zero_point is not None:
        total += size(q.zero_point, scheme.zero_point)
    return total


_NUMBERS = (((1,), (0,)), ((), ()))


def dot_by(case: Case, backend: str) -> Callable[..., Any]:
    """The dot of a case by a named backend, which rounds activations if it can."""
    return lambda x, w: dot_general(
        x, w, _NUMBERS, out_dtype=case.dtype, activations=case.activations, backend=backend
    )


def dequantized_dot(x: Any, w: Any) -> Any:
    """What is written without kernels: the weight in the dtype of `x`, and a product."""
    w = dequantize(w, x.dtype) if isinstance(w, QArray) else w
    return jax.lax.dot_general(x, w, _NUMBERS, preferred_element_type=jnp.float32).astype(x.dtype)


def compile_dot(case: Case, backend: str, target: Target, *, schedule: bool = True) -> Outcome:
    """Compiles the dot of a case by a named backend, through the dispatch that models use."""
    return compiled(dot_by(case, backend), operands(case, backend), target, schedule=schedule)


def compiled(
    fn: Callable[..., Any], args: tuple[Any, ...], target: Target, *, schedule: bool = True
) -> Outcome:
    """Compiles a function, and says what became of it."""
    try:
        with jax.set_mesh(mesh_for(target)):
            jaxpr = jax.make_jaxpr(fn)(*args)
    except Refusal as refusal:
        return Outcome(status=Status.REFUSED, reason=str(refusal))
    except _FAILURES as error:
        return Outcome(status=Status.FAILED, reason=_first_line(error))
    moved = traffic(jaxpr.jaxpr, target.cores) if target.platform == "tpu" else ()
    try:
        found = compile_for(fn, args, target, schedule=schedule)
    except _FAILURES as error:
        return Outcome(status=Status.FAILED, reason=_first_line(error))
    return Outcome(status=Status.COMPILED, figures=_figures(found, moved))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:400]}"


def _figures(found: Compiled, moved: Sequence[Traffic]) -> Figures:
    used, known, cycles = _VMEM.findall(found.text), True, None
    if found.schedule is not None:
        known = found.scheduled().known
        programs = [
            (step.runs, found.schedule.programs[step.name], step.kernel is not None)
            for step in found.hlo.steps
            if step.name in found.schedule.programs
        ]
        cycles = _cycles(programs)
    return Figures(
        hbm_bytes=found.hlo.bytes_moved + _read_again(found, moved),
        on_chip_bytes=found.hlo.bytes_on_chip,
        accessed_bytes=0.0 if found.cost is None else found.cost.bytes_accessed,
        first_bytes=sum(each.first for each in moved),
        temporary_bytes=found.memory.temporaries,
        vmem_bytes=max(map(int, used)) if used and moved else None,
        cycles=cycles,
        known=known,
        kernels=tuple(_cuda_kernel(kernel, found.target) for kernel in found.kernels),
        library_calls={name: n for name, n in found.hlo.custom_calls.items() if "$" in name},
    )


def _read_again(found: Compiled, moved: Sequence[Traffic]) -> int:
    """Bytes that the HLO leaves out: it counts what a kernel takes and gives once.

    Where XLA has put operands on the chip before, kernels read them there.
    """
    by_name, total = {each.name: each.bytes for each in moved}, 0
    for step in found.hlo.steps:
        if step.kernel in by_name and step.on_chip == 0:
            total += step.runs * max(0, by_name[step.kernel] - step.bytes)
    return total


def _cuda_kernel(kernel: CudaKernel, target: Target) -> dict[str, Any]:
    """What `CudaKernel` says, as JSON holds it: keys are texts."""
    assert target.multiprocessor is not None

    def sizes(loads: Mapping[int, int]) -> dict[str, int]:
        return {str(size): count for size, count in loads.items()}

    def by_argument(loads: Mapping[int, Mapping[int, int]]) -> dict[str, dict[str, int]]:
        return {str(argument): sizes(own) for argument, own in loads.items()}

    return {
        "name": kernel.name,
        "grid": list(kernel.grid),
        "threads": kernel.threads,
        "registers": kernel.registers,
        "shared_bytes": kernel.shared_bytes,
        "spill_bytes": kernel.spill_bytes,
        "blocks": kernel.blocks(target.multiprocessor),
        "loops": kernel.loops,
        "matrix": dict(kernel.matrix),
        "matrix_in_loops": dict(kernel.matrix_in_loops),
        "loads": sizes(kernel.loads),
        "loads_in_loops": sizes(kernel.loads_in_loops),
        "loads_of": by_argument(kernel.loads_of),
        "loads_of_in_loops": by_argument(kernel.loads_of_in_loops),
        "bulk_loads": kernel.bulk_loads,
        "warnings": list(kernel.warnings),
    }


def _cycles(programs: list[tuple[int, Program, bool]]) -> Cycles:
    exact, bound, spills, step, steps, set_up = 0, 0, 0, 0, 0, 0
    longest = 0
    for runs, program, kernel in programs:
        left, own = _left_out(program) if kernel else (0, 0)
        exact += runs * (program.cycles - left)
        bound += runs * program.cycles
        spills += program.spills
        loop = program.hottest
        if loop is not None and runs * program.cycles > longest:
            longest = runs * program.cycles
            step, steps, set_up = loop.bundles - own, loop.steps or loop.turns or 1, own
    return Cycles(exact=exact, bound=bound, step=step, steps=steps, set_up=set_up, spills=spills)


def _left_out(program: Program) -> tuple[int, int]:
    """Bundles that `program.cycles` counts though their condition does not hold; and the set-up.

    Of the kernels of `ops/dot`, whose grids are (cores, rows, columns, k) and whose conditions come
    in this order: the set-up, with the first tile of columns; then, for each part of the columns
    where there are several steps along k: the first of these, those between, the last.
    """
    loop = next((each for each in program.loops if each.grid and len(each.grid) == 4), None)
    if loop is None or loop.grid is None:
        return 0, 0
    *_, n_steps, k_steps = loop.grid
    stretches, steps = list(loop.conditional), loop.steps or 1
    sums = len(stretches) // 3 * 3 if k_steps > 1 else 0
    if len(stretches) - sums > 1:
        return 0, 0
    set_up = stretches[0] if len(stretches) > sums else 0
    left = set_up * (steps - steps // n_steps)
    for at, bundles in enumerate(stretches[len(stretches) - sums :]):
        runs = steps * (k_steps - 2) // k_steps if at % 3 == 1 else steps // k_steps
        left += bundles * (steps - runs)
    return left, set_up


def part_seconds(figures: Figures, target: Target) -> tuple[float, float, float]:
    """Seconds of the bundles at the clock, of these counted in every step, and of the bytes."""
    cycles = figures.cycles
    exact, bound = (0, 0) if cycles is None else (cycles.exact, cycles.bound)
    memory = figures.hbm_bytes / target.hbm_bytes_per_second
    return exact / target.clock_hz, bound / target.clock_hz, memory


Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function that can be named, and its arguments."""


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    progress: Callable[[int, int], None],
) -> list[Any]:
    """What each job gives, in order.

    With more than one worker, in processes of their own: libtpu compiles one program at a time.
    """
    if workers == 1:
        on_cpu()
        found = []
        for done, (function, arguments) in enumerate(jobs):
            progress(done, len(jobs))
            found.append(function(*arguments))
        progress(len(jobs), len(jobs))
        return found
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=on_cpu
    ) as pool:
        futures = [pool.submit(function, *arguments) for function, arguments in jobs]
        try:
            for done, _ in enumerate(concurrent.futures.as_completed(futures)):
                progress(done, len(jobs))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


def on_cpu() -> None:
    """Leaves the libraries of other chips to the compilers."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    config: Any = jax.config
    config.update("jax_platforms", "cpu")
