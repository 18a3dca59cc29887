"""What becomes of each kernel of a CUDA program: registers, shared memory, instructions, blocks.

XLA writes the PTX of each kernel, and how each is launched; `ptxas` (of the package
nvidia-cuda-nvcc-cu12) makes machine code of the PTX and tells its registers and spills. No
disassembler comes from a registry, so instructions are those of the PTX.
"""

import dataclasses
import importlib.metadata
import math
import pathlib
import re
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

from ._targets import Multiprocessor

_PACKAGE = "nvidia-cuda-nvcc-cu12"

_Launch = tuple[str, tuple[int, ...], int, int]
"""A kernel's name, grid, threads of a block, and bytes of shared memory that the launch adds."""

_LAUNCH = re.compile(
    r"^\s*(?P<id>\d+): .*\] (?P<name>\S+) grid: \[(?P<grid>[\d, ]+)\] "
    r"threads: \[(?P<threads>[\d, ]+)\]\s+shared_memory: (?P<shared>\d+) bytes",
    re.MULTILINE,
)
_THUNK = re.compile(r'profile_annotation: "(?P<name>[^"]*)"\s+thunk_id: (?P<id>\d+)')
_ENTRY = re.compile(r"^\.visible \.entry ([\w$]+)\(", re.MULTILINE)
_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
_LABEL = re.compile(r"^(\$\w+):")
_JUMP = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);")
_MATRIX = re.compile(r"^\s*(?:@!?%\w+\s+)?((?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*)")
_LOAD = re.compile(r"\bld\.global((?:\.[\w:]+)*?)(?:\.v(\d))?\.[busf](\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\S*\.global\S*\s*\[[^\]]*\],\s*\[[^\]]*\],\s*(\w+)")
_PARAMETER = re.compile(r"\bld\.param\.[bsu]64\s+(%rd\d+),\s*\[\w+?_param_(\d+)\]")
_ADDRESS = re.compile(r"\[\s*(%rd\d+)")
_MADE = re.compile(r"^\s*(?:@!?%p\d+\s+)?(?!ld|atom)[\w.:]+\s+(%rd\d+),(.*);")
_BULK = re.compile(r"\bcp\.async\.bulk\S*\.global\b")
_USED = re.compile(r"Used (\d+) registers")
_STATIC = re.compile(r"(\d+) bytes smem")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CudaKernel:
    """One kernel as it is launched.

    `matrix` counts the tensor-core instructions of the PTX by kind, `loads` the loads from global
    memory by the bytes that a thread gets (`ld.global`, `cp.async`); `matrix_in_loops` and
    `loads_in_loops` are those that stand in a loop. `loads_of` and `loads_of_in_loops` say it of
    each argument, by its number: of loads whose address comes from one argument alone. `bulk_loads`
    are those of whole tiles (TMA). `loops`: how many there are; none where all are unrolled.
    """

    name: str
    instructions: tuple[str, ...]
    """The instructions of the HLO that launch it."""
    grid: tuple[int, ...]
    threads: int
    registers: int
    shared_bytes: int
    """Of a block: what the code declares, and what the launch adds."""
    stack_bytes: int
    spill_bytes: int
    """Stored and loaded by a thread for want of registers, each place of the code once."""
    matrix: Mapping[str, int]
    matrix_in_loops: Mapping[str, int]
    loads: Mapping[int, int]
    loads_in_loops: Mapping[int, int]
    loads_of: Mapping[int, Mapping[int, int]]
    loads_of_in_loops: Mapping[int, Mapping[int, int]]
    bulk_loads: int
    loops: int
    warnings: tuple[str, ...]
    """What ptxas says about speed, as that wgmma instructions wait for each other."""

    def blocks(self, multiprocessor: Multiprocessor) -> int:
        """How many blocks a multiprocessor holds at once."""
        return blocks_at_once(
            multiprocessor,
            threads=self.threads,
            registers=self.registers,
            shared_bytes=self.shared_bytes,
        )


def blocks_at_once(m: Multiprocessor, *, threads: int, registers: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor holds at once: the least of four limits.

    With `w = ceil(threads / 32)` warps a block:

    - threads: `floor(2048 / 32 / w)`, and at most 32 blocks;
    - registers: a warp takes `32 * registers`, rounded up to 256. The file is in four parts, each
      serving a quarter of the warps, so that `4 * floor(65536 / 4 / warp's)` warps fit;
    - shared memory: a block takes its bytes and the system's 1,024, rounded up to 128, of 228 KiB.

    Source: the CUDA occupancy calculator (`cuda_occupancy.h`) for compute capability 9.0. 0 means
    that the kernel cannot be launched.
    """
    warps = -(-threads // m.warp)
    limits = [m.blocks, m.threads // m.warp // warps]
    if registers:
        a_warp = -(-registers * m.warp // m.register_unit) * m.register_unit
        limits.append(m.registers // 4 // a_warp * 4 // warps)
    if shared_bytes > m.shared_bytes_a_block:
        return 0
    a_block = -(-(shared_bytes + m.reserved_bytes_a_block) // m.shared_unit) * m.shared_unit
    return min(*limits, m.shared_bytes // a_block)


def _ptxas() -> pathlib.Path:
    try:
        files = importlib.metadata.files(_PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.name == "ptxas":
            return pathlib.Path(str(file.locate()))
    raise ImportError(
        f"Reading a CUDA program needs ptxas, of the package {_PACKAGE}. "
        'Run `pip install "jaxquant[aot]"` (Linux on x86_64), or pass schedule=False.'
    )


def _loops(lines: list[str]) -> list[range]:
    """Line numbers of the bodies of loops: from a label to a jump back to it."""
    labels = {found[1]: i for i, line in enumerate(lines) if (found := _LABEL.match(line))}
    jumps = ((i, found[1]) for i, line in enumerate(lines) for found in _JUMP.finditer(line))
    return [range(labels[to], i + 1) for i, to in jumps if labels.get(to, i) < i]


def _count(found: Iterable) -> dict:
    total: dict = {}
    for each in found:
        total[each] = total.get(each, 0) + 1
    return dict(sorted(total.items()))


def _origins(lines: list[str]) -> dict[str, set[int]]:
    """For each 64-bit register, the numbers of the arguments that it was computed from."""
    origins: dict[str, set[int]] = {}
    made = []
    for line in lines:
        if found := _PARAMETER.search(line):
            origins.setdefault(found[1], set()).add(int(found[2]))
        elif found := _MADE.match(line):
            made.append((found[1], re.findall(r"%rd\d+", found[2])))
    grown = True
    while grown:  # A loop's registers are made from ones that stand below.
        grown = False
        for to, sources in made:
            new = set().union(*(origins.get(each, set()) for each in sources))
            if not new <= origins.setdefault(to, set()):
                origins[to] |= new
                grown = True
    return origins


def _by_argument(found: Iterable[tuple[str, int]], origins: dict[str, set[int]]) -> dict:
    sizes: dict[int, list[int]] = {}
    for line, size in found:
        address = _ADDRESS.search(line)
        arguments = origins.get(address[1], set()) if address else set()
        if len(arguments) == 1:
            (argument,) = arguments
            sizes.setdefault(argument, []).append(size)
    return {argument: _count(own) for argument, own in sorted(sizes.items())}


def read_ptx(text: str) -> dict[str, Any]:
    """The fields of `CudaKernel` that PTX tells: matrix instructions and loads, also in loops."""
    lines = text.splitlines()
    loops, origins = _loops(lines), _origins(lines)
    inside = {i for body in loops for i in body}
    matrix = [(i, found[1]) for i, line in enumerate(lines) if (found := _MATRIX.match(line))]
    loads = [
        *(
            (i, int(found[2] or 1) * int(found[3]) // 8)
            for i, line in enumerate(lines)
            for found in _LOAD.finditer(line)
        ),
        *((i, int(found[1], 0)) for i, line in enumerate(lines) for found in _COPY.finditer(line)),
    ]
    return {
        "matrix": _count(kind for _, kind in matrix),
        "matrix_in_loops": _count(kind for i, kind in matrix if i in inside),
        "loads": _count(size for _, size in loads),
        "loads_in_loops": _count(size for i, size in loads if i in inside),
        "loads_of": _by_argument(((lines[i], size) for i, size in loads), origins),
        "loads_of_in_loops": _by_argument(
            ((lines[i], size) for i, size in loads if i in inside), origins
        ),
        "bulk_loads": sum(len(_BULK.findall(line)) for line in lines),
        "loops": len({body.start for body in loops}),
    }


def read_assembly(report: str) -> dict[str, Any]:
    """The fields that `ptxas -v` tells: registers, declared shared memory, spills, warnings.

    **Raises:** `ValueError` if the report names no registers.
    """
    used, spills = _USED.search(report), _SPILLS.search(report)
    if used is None or spills is None:
        raise ValueError(f"ptxas tells no registers or spills:\n{report[:1000]}")
    static = _STATIC.search(report)
    return {
        "registers": int(used[1]),
        "shared_bytes": int(static[1]) if static else 0,
        "stack_bytes": int(spills[1]),
        "spill_bytes": int(spills[2]) + int(spills[3]),
        "warnings": tuple(
            line.partition(":")[2].strip()
            for line in report.splitlines()
            if "Performance" in line or line.startswith("ptxas warning")
        ),
    }


def read_kernels(folder: pathlib.Path) -> tuple[CudaKernel, ...]:
    """Reads what one compilation left in XLA's dump folder, kernels in the order of launches.

    **Raises:** `ImportError` without ptxas; `ValueError` if ptxas refuses the PTX, or if a kernel
    is launched whose PTX is not there.
    """
    launches, names = _launches(folder)
    texts = {}
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        if found := _ENTRY.findall(text):
            texts |= dict.fromkeys(found, (path, text))
    kernels = []
    for (name, grid, threads, shared), ids in launches.items():
        if name not in texts:
            raise ValueError(
                f"The kernel {name} is launched, but XLA wrote no PTX of it; it wrote that of "
                f"{sorted(texts)}."
            )
        path, text = texts[name]
        facts = {**_assembled(path, name, text), **read_ptx(_body(text, name))}
        facts["shared_bytes"] += shared
        kernels.append(
            CudaKernel(
                name=name,
                instructions=tuple(names.get(each, name) for each in ids),
                grid=grid,
                threads=threads,
                **facts,
            )
        )
    return tuple(kernels)


def _launches(folder: pathlib.Path) -> tuple[dict[_Launch, list[int]], dict[int, str]]:
    """Launches by kernel and size, with the ids of their thunks; and the HLO names of the ids."""
    launches: dict[_Launch, list[int]] = {}
    names: dict[int, str] = {}
    for path in folder.glob("*.thunk_sequence.txt"):
        for found in _LAUNCH.finditer(path.read_text()):
            grid = tuple(map(int, found["grid"].split(",")))
            threads = math.prod(map(int, found["threads"].split(",")))
            key = (found["name"], grid, threads, int(found["shared"]))
            launches.setdefault(key, []).append(int(found["id"]))
    for path in folder.glob("*.thunk_metadata.txt"):
        for found in _THUNK.finditer(path.read_text()):
            names[int(found["id"])] = found["name"]
    return launches, names


def _body(text: str, name: str) -> str:
    """The PTX of one entry: up to the next one."""
    start = text.index(f".entry {name}(")
    following = _ENTRY.search(text, start + 1)
    return text[start : following.start() if following else len(text)]


def _assembled(path: pathlib.Path, name: str, text: str) -> dict[str, Any]:
    target = _TARGET.search(text)
    done = subprocess.run(
        [
            *(str(_ptxas()), f"-arch={target[1] if target else 'sm_90a'}", "-v"),
            *(f"--entry={name}", str(path), "-o", str(path.with_suffix(".cubin"))),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"ptxas refuses the kernel {name}:\n{done.stderr[:1000]}")
    return read_assembly(done.stderr)
