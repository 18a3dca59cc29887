"""Instructions, registers and blocks are read from what XLA and ptxas write."""

import jax
import jax.numpy as jnp
import pytest

from jaxquant.aot import blocks_at_once, compile_for, parse_target
from jaxquant.aot._cuda_binary import read_assembly, read_kernels, read_ptx

H100, _ = parse_target("h100")

# Cut from a Triton kernel that multiplies tiles in a loop.
PTX = """\
.version 8.6
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry mm(
\t.param .u64 .ptr .global .align 1 mm_param_0
)
.reqntid 128, 1, 1
{
\tld.param.b64 \t%rd1, [mm_param_0];
\tld.param.b64 \t%rd5, [mm_param_1];
\tcvta.to.global.u64 \t%rd2, %rd5;
\tmul.wide.s32 \t%rd6, %r5, 2;
\tadd.s64 \t%rd9, %rd1, %rd6;
\tadd.s64 \t%rd12, %rd2, %rd1;
\t@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd9 + 0 ];
\tcp.async.cg.shared.global [ %r13 + 0 ], [ %rd9 + 0 ], 0x10, %r14;
$L__BB0_1:
\tld.global.L1::evict_last.b16 %rs1, [%rd2];
\tld.global.nc.v2.f64 {%fd1, %fd2}, [%rd2];
\tcp.async.ca.shared.global [ %r13 + 0 ], [ %rd9 + 0 ], 0x8, %r14;
\tld.global.b16 %rs2, [%rd12];
\tld.global.b64 %rd2, [%rd9];
\tadd.s64 \t%rd9, %rd10, 64;
\tmov.b64 \t%rd10, %rd9;
\tld.shared.v4.b32 {%r7, %r8, %r9, %r10}, [%r6];
\twgmma.fence.sync.aligned;
\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r170}, %rd35, %rd36, %p4, 1, 1, 0, 1;
\t@%p3 bra \t$L__BB0_1;
\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
\tbra.uni \t$L__BB0_2;
$L__BB0_2:
\tcp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2}];
\tret;
}
"""
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'mm' for 'sm_90a'
ptxas info    : Function properties for mm
    24 bytes stack frame, 16 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 4224 bytes smem, 360 bytes cmem[0]
"""


def test_instructions_are_counted_by_kind_and_place():
    wgmma = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    assert read_ptx(PTX) == {
        "matrix": {mma: 1, wgmma: 1},
        "matrix_in_loops": {wgmma: 1},
        "loads": {2: 2, 8: 2, 16: 3},
        "loads_in_loops": {2: 2, 8: 2, 16: 1},
        # An address of two arguments is of neither.
        "loads_of": {0: {8: 2, 16: 2}, 1: {2: 1, 16: 1}},
        "loads_of_in_loops": {0: {8: 2}, 1: {2: 1, 16: 1}},
        "bulk_loads": 1,
        "loops": 1,
    }


def test_the_report_of_the_assembler_is_read():
    facts = read_assembly(REPORT)
    assert (facts["registers"], facts["shared_bytes"]) == (64, 4224)
    assert (facts["stack_bytes"], facts["spill_bytes"]) == (24, 28)
    (warning,) = facts["warnings"]
    assert "serialized" in warning
    with pytest.raises(ValueError, match="tells no registers"):
        read_assembly("ptxas info    : 0 bytes gmem\n")


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (128, 0, 0, 16),  # threads
        (32, 16, 0, 32),  # blocks
        (128, 64, 0, 8),  # registers: 32 warps of 2,048
        (128, 255, 0, 2),  # registers: 8 warps of 8,192
        (256, 168, 0, 1),  # 5,376 a warp: 3 in each quarter, 12 in all
        (128, 32, 227 << 10, 1),  # shared memory, to the last byte
        (128, 32, 113 << 10, 2),
        (128, 32, (113 << 10) + 1, 1),
        (128, 32, (227 << 10) + 1, 0),  # cannot be launched
        (1024, 80, 0, 0),  # nor can this: 24 warps fit where 32 are wanted
    ],
)
def test_blocks_by_hand(threads, registers, shared, blocks):
    found = blocks_at_once(
        H100.multiprocessor, threads=threads, registers=registers, shared_bytes=shared
    )
    assert found == blocks


def test_a_launch_without_its_code_is_refused(tmp_path):
    (tmp_path / "m.thunk_sequence.txt").write_text(
        "001: kCustomKernel [source | sink] mm grid: [16, 32, 1] threads: [128, 1, 1]  "
        "shared_memory: 32768 bytes\n"
    )
    with pytest.raises(ValueError, match="The kernel mm is launched, but XLA wrote no PTX"):
        read_kernels(tmp_path)


def _shape(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


@pytest.mark.aot
def test_the_kernels_of_a_matmul_use_the_tensor_cores():
    out = compile_for(lambda x, w: x @ w, (_shape(64, 2048), _shape(2048, 1024)), H100)
    (gemm,) = (kernel for kernel in out.kernels if kernel.matrix)
    assert all("bf16" in kind for kind in gemm.matrix)
    assert gemm.matrix_in_loops and gemm.loads_in_loops
    assert gemm.spill_bytes == 0 and 0 < gemm.registers <= 255
    assert gemm.blocks(H100.multiprocessor) >= 2
    steps = {step.name: step for step in out.hlo.steps}
    (name,) = gemm.instructions
    assert "dot" in name and steps[name].read >= 2 * 2048 * 1024
    with pytest.raises(ValueError, match="only libtpu writes one"):
        out.scheduled()


@pytest.mark.aot
def test_a_kernel_in_a_loop_is_read_too():
    def f(x, w):
        return jax.lax.scan(lambda c, each: (jnp.tanh(c @ each), None), x, w)[0]

    out = compile_for(f, (_shape(64, 1024), _shape(5, 1024, 1024)), H100)
    gemms = [kernel for kernel in out.kernels if kernel.matrix]
    assert gemms
    (step,) = (step for step in out.hlo.steps if step.name == gemms[0].instructions[0])
    assert step.runs == 5


@pytest.mark.aot
def test_binary_facts_can_be_left_out():
    out = compile_for(lambda x: x @ x, (_shape(64, 64),), H100, schedule=False)
    assert out.kernels == () and out.schedule is None
