"""Compiling for chips that are not here: memory, cost, schedules."""

from ._compile import (
    compile_for as compile_for,
    Compiled as Compiled,
    Cost as Cost,
    Memory as Memory,
    ScheduledStep as ScheduledStep,
    ScheduledTime as ScheduledTime,
)
from ._cuda_binary import blocks_at_once as blocks_at_once, CudaKernel as CudaKernel
from ._hlo import (
    Collective as Collective,
    hlo_facts as hlo_facts,
    HloFacts as HloFacts,
    Step as Step,
)
from ._model import (
    compile_step as compile_step,
    CompiledStep as CompiledStep,
    LaidOut as LaidOut,
    lay_out as lay_out,
)
from ._placement import Placement as Placement, tensor_parallel as tensor_parallel
from ._roofline import DecoderStep as DecoderStep, Roofline as Roofline, roofline as roofline
from ._targets import (
    Multiprocessor as Multiprocessor,
    parse_target as parse_target,
    Target as Target,
    TARGETS as TARGETS,
)
from ._topology import mesh_for as mesh_for
from ._tpu_schedule import Loop as Loop, Program as Program, TpuSchedule as TpuSchedule
