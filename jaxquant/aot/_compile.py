"""Compiling a function for a chip that is not here, and what the compiler then tells."""

import contextlib
import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._cuda_binary import CudaKernel, read_kernels
from ._hlo import hlo_facts, HloFacts
from ._targets import Target
from ._topology import mesh_for, tpu_dumps
from ._tpu_schedule import read_schedule, TpuSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device's main memory that a program needs, as the compiler lays arrays out.

    `aliased` bytes are outputs that reuse arguments: they are in both.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    code: int

    @property
    def total(self) -> int:
        """What must fit while the program runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """XLA's own count for one device. It does not look into kernels, and runs loops once.

    `bytes_accessed` counts what instructions touch wherever it stands, memory on the chip included:
    `HloFacts.bytes_moved` is the traffic of the main memory.
    """

    flops: float
    transcendentals: float
    bytes_accessed: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduledStep:
    """One instruction's two sides, in seconds of one run.

    `compute` is None where the schedule has no code of the instruction's own (a copy by DMA, or a
    few bundles of the top level). `known` is False where a loop's turns could not be read, so that
    `compute` is too small.
    """

    name: str
    op_name: str
    kernel: str | None
    runs: int
    compute: float | None
    memory: float
    known: bool

    @property
    def seconds(self) -> float:
        """All runs, each as long as its longer side."""
        return self.runs * max(self.compute or 0.0, self.memory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduledTime:
    """What a schedule says of the time: no measurement, and no stalls in it.

    Exchanges between devices are left out. So is a wait for the matrix units, which bundles may
    hand more than they take (a dense matmul on 7x is listed with 1,671 bundles where they need
    2,048 cycles): hold a program that does much arithmetic against the matrix rate as well.
    """

    steps: tuple[ScheduledStep, ...]

    @property
    def seconds(self) -> float:
        """The sum over instructions of the longer of bundles at the clock and bytes at the HBM."""
        return sum(step.seconds for step in self.steps)

    @property
    def compute_seconds(self) -> float:
        """All bundles at the clock."""
        return sum(step.runs * (step.compute or 0.0) for step in self.steps)

    @property
    def memory_seconds(self) -> float:
        """All bytes at the bandwidth of the main memory."""
        return sum(step.runs * step.memory for step in self.steps)

    @property
    def overlapped_seconds(self) -> float:
        """The longer of the two sides of the whole: what perfect overlap would leave."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def known(self) -> bool:
        """Whether all loops were read; if not, the times are too small."""
        return all(step.known for step in self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program compiled for `devices` devices of `target`; figures are those of one device."""

    target: Target
    devices: int
    memory: Memory
    cost: Cost | None
    """None where the compiler counts nothing (CUDA)."""
    text: str
    """The optimized HLO."""
    hlo: HloFacts
    schedule: TpuSchedule | None
    kernels: tuple[CudaKernel, ...]
    """Each kernel of a CUDA program; none for a TPU."""

    @property
    def fits(self) -> bool:
        """Whether the program fits in a device's main memory."""
        return self.memory.total <= self.target.hbm_bytes

    @property
    def memory_bound_seconds(self) -> float:
        """The bytes that the program moves, at the bandwidth of the main memory."""
        return self.hlo.bytes_moved / self.target.hbm_bytes_per_second

    def scheduled(self) -> ScheduledTime:
        """The schedule's time beside the memory's, instruction by instruction.

        An array that XLA fetches ahead into memory on the chip (`copy-start`) is a step of its own,
        though others run beside it: `seconds` is on the careful side there, `overlapped_seconds`
        on the hopeful one. Where a program is one kernel, XLA may fetch all of its weights so.

        **Raises:** `ValueError` if there is no schedule: for CUDA, or with `schedule=False`.
        """
        if self.schedule is None:
            raise ValueError(
                f"This program for {self.target.name} has no schedule: only libtpu writes one, and "
                "only when compile_for is called with schedule=True."
            )
        programs, steps = self.schedule.programs, []
        exchanges = {each.name for each in self.hlo.collectives}
        for step in self.hlo.steps:
            if step.name in exchanges:
                continue
            program = programs.get(step.name)
            steps.append(
                ScheduledStep(
                    name=step.name,
                    op_name=step.op_name,
                    kernel=step.kernel,
                    runs=step.runs,
                    compute=None if program is None else program.cycles / self.target.clock_hz,
                    memory=step.bytes / self.target.hbm_bytes_per_second,
                    known=program is None or program.known,
                )
            )
        return ScheduledTime(steps=tuple(steps))


def _placed(args: Any, mesh: Mesh) -> Any:
    """`args` as shapes on the mesh: as they are sharded, or whole on every device."""
    whole = NamedSharding(mesh, PartitionSpec())

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        on_mesh = isinstance(sharding, NamedSharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding if on_mesh else whole)

    return jax.tree.map(shape, args)


def _mesh_of(args: Any, target: Target, mesh: Mesh | None) -> Mesh:
    """The mesh that the arguments are laid over; one device if none is."""
    for leaf in jax.tree.leaves(args):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            mesh = cast(Mesh, sharding.mesh) if mesh is None else mesh
            if sharding.mesh != mesh:
                raise ValueError(
                    f"The arguments are sharded over two meshes: {sharding.mesh} and {mesh}. Take "
                    "one from jaxquant.aot.mesh_for and lay all of them over it."
                )
    mesh = mesh_for(target) if mesh is None else mesh
    kind = mesh.devices.flat[0].device_kind
    if kind != target.device_kind:
        raise ValueError(
            f"The mesh {mesh} is made of {kind}; {target.name} is {target.device_kind}. Take the "
            "mesh from jaxquant.aot.mesh_for."
        )
    return mesh


def compile_for(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    target: Target,
    *,
    mesh: Mesh | None = None,
    donate: tuple[int, ...] = (),
    schedule: bool = True,
    kernel_bytes: Mapping[str, int] | None = None,
) -> Compiled:
    """Compiles `fn(*args)` for a chip that is not here, and reads what the compiler tells.

    `args` are pytrees of arrays or `jax.ShapeDtypeStruct`s (`abstract_qarray` gives such a
    QArray): shapes suffice, values are not read. They are whole on one device, or laid over a mesh
    of `mesh_for` by their `NamedSharding`s; those without one are whole on every device of it.
    `mesh` is needed only where none of them has a sharding. `fn` is traced under
    `jax.set_mesh(mesh)`, so that it sees the chip that it is for; if it is jitted already, it is
    lowered as it is. `donate` names the arguments whose memory outputs may reuse.

    `schedule=False` leaves the schedule (TPU) or the binary facts (CUDA) out. `kernel_bytes`: see
    `hlo_facts`.

    **Raises:** `ImportError` if the compiler's package is not installed; `RuntimeError` if JAX does
    not run on the CPU, or if libtpu was loaded before without the flags for a schedule;
    `ValueError` for arguments on two meshes, or on devices that are not `target`'s. What the
    compiler refuses is its own `jax.errors.JaxRuntimeError`: RESOURCE_EXHAUSTED for a program
    that does not fit a TPU (libtpu keeps a little of the memory for itself: 15.75 of v5e's 16
    GiB can be had). For CUDA a program that does not fit compiles, and `fits` says so.
    """
    mesh = _mesh_of(args, target, mesh)
    read = {"tpu": _compile_tpu, "cuda": _compile_cuda}[target.platform]
    with jax.set_mesh(mesh):
        # A function of its own: what was compiled before would not be written again.
        jitted = fn if hasattr(fn, "lower") else jax.jit(lambda *a: fn(*a), donate_argnums=donate)
        lowered = jitted.lower(*_placed(args, mesh))
        with _not_kept():
            compiled, found, kernels = read(lowered, schedule)
    stats, text = compiled.memory_analysis(), compiled.as_text()
    cost = compiled.cost_analysis()
    return Compiled(
        target=target,
        devices=mesh.devices.size,
        memory=Memory(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            code=stats.generated_code_size_in_bytes,
        ),
        cost=Cost(
            flops=cost.get("flops", 0.0),
            transcendentals=cost.get("transcendentals", 0.0),
            bytes_accessed=cost.get("bytes accessed", 0.0),
        )
        if cost
        else None,
        text=text,
        hlo=hlo_facts(text, kernel_bytes),
        schedule=found,
        kernels=kernels,
    )


@contextlib.contextmanager
def _not_kept() -> Iterator[None]:
    """JAX's cache of programs on disk would keep what it cannot load without the chip."""
    config: Any = jax.config
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(config, name)
    config.update(name, math.inf)
    try:
        yield
    finally:
        config.update(name, before)


def _compile_tpu(lowered: Any, schedule: bool):
    if not schedule:
        return lowered.compile(), None, ()
    with tpu_dumps().of_one_program() as folder:
        # A folder of its own makes the options new, so that no cached program is taken.
        with tempfile.TemporaryDirectory() as own:
            compiled = lowered.compile(compiler_options={"xla_dump_to": own})
        return compiled, read_schedule(folder), ()


def _compile_cuda(lowered: Any, schedule: bool):
    # Tuning needs the chip.
    options = {"xla_gpu_autotune_level": "0"}
    if not schedule:
        return lowered.compile(compiler_options=options), None, ()
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={**options, "xla_dump_to": folder})
        return compiled, None, read_kernels(pathlib.Path(folder))
