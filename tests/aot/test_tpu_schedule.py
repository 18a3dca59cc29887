"""Loops, turns, units and spills are read from listings as libtpu writes them."""

import jax
import jax.numpy as jnp
import pytest

from jaxquant.aot import compile_for, parse_target
from jaxquant.aot._tpu_schedule import read_program, read_schedule
from jaxquant.ops import _pallas

# Cut from the listing of a pipelined kernel of 16 steps on v5e: two turns fill and drain it.
PIPELINE = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %6 = vsyncpa [#allocation3], 0 }
   0x1   :  { %s742_s8 = smov 0 /* copy for cssa */  ;;  %s744_s9 = smov 0 /* copy for cssa */ }
   0x2 LB: > { %s758_s11 = sadd.s32 1, %s724_s9  ;;  %s724_s9 = sphi %s744_s9, %s1097_s9 }
   0x3   : > { %620 = dma.hbm_to_vmem [thread:$0]  /* 
base_bounds: (512, 4)
iteration_bounds: (16)
strides: (32, 4) */ }
   0x4   : > { %109 = sbr.rel (%p106_p5) target = $region24 }
   0x5   :  {}
   0x6   :  {} /* End region 22 */
   0x7   : > { %400 = vst [vmem:[%s818_s23] sm:$0xff] /*vst_source=*/%v272_v3 }
   0x8 PF: > { %p11_p7 = scmp.ge.s32.totalorder %s758_s11, 18 /* loop exit test */ } /* x
Start/End empty region 24 */
   0x9   : > { %s1097_s9 = smov %s758_s11  ;;  %13 = sbr.rel (!%p11_p7) target = $region64 }
   0xa   :  { %590 = vsyncpa [#allocation5], 1 } /* exit bundle: %k.1 = custom-call(%x.1) */
"""
UNITS = """\
== CAPACTIY:
MXU, VALU, VLOAD:FILL, VSTORE:SPILL
    4     4     3     1
== UTILIZATION:
0 0 0 0
0 0 0 0
0 1 0 0
0 2 0 0
0 0 0 0
0 0 0 0
0 0 0 0
2 4 1 1
0 0 0 0
0 1 0 0
0 0 0 0
"""
# A loop of four turns around one whose bound is in a register and one of three turns.
NESTED = """\
   0x0   :  { %s1_s1 = smov 0 /* copy for cssa */ }
   0x1 LB: > { %s2_s2 = sadd.s32 1, %s3_s3  ;;  %s3_s3 = sphi %s1_s1, %s4_s4 }
   0x2   : > { %s9_s9 = smov 0 /* copy */ }
   0x3 LB: >> { %p5_p5 = scmp.ge.s32.totalorder %s6_s6, %s7_s7 /* loop exit test */ }
   0x4   : >> { %8 = sbr.rel (!%p5_p5) target = $region9 }
   0x5 LB: >> { %s11_s11 = sadd.s32 1, %s12_s12  ;;  %s12_s12 = sphi %s9_s9, %s13_s13 }
   0x6   : >> { %p14_p14 = scmp.ge.s32.totalorder %s11_s11, 3 /* loop exit test */ }
   0x7   : > { %p15_p15 = scmp.ge.s32.totalorder %s2_s2, 4 /* loop exit test */ }
   0x8   :  { %16 = sbr.rel (!%p15_p15) target = $region1 }
"""


def test_a_pipeline_runs_its_steps_and_skips_its_body_to_fill_and_drain():
    program = read_program("k.1", PIPELINE, UNITS)
    (loop,) = program.loops
    assert (program.bundles, program.outside, loop.bundles) == (11, 3, 8)
    assert (loop.turns, loop.steps, loop.skipped) == (18, 16, 3)
    assert program.cycles == 3 + 16 * 8 + 2 * (8 - 3)
    assert program.known and program.hottest == loop


def test_units_are_counted_by_loop():
    program = read_program("k.1", PIPELINE, UNITS)
    assert program.capacity == {"MXU": 4, "VALU": 4, "VLOAD:FILL": 3, "VSTORE:SPILL": 1}
    assert program.used == {"MXU": 2, "VALU": 8, "VLOAD:FILL": 1, "VSTORE:SPILL": 1}
    assert program.spills == 2
    assert program.utilization(program.loops[0])["MXU"] == 2 / (8 * 4)
    assert program.utilization()["VALU"] == 8 / (11 * 4)


def test_loops_nest_and_an_unread_bound_is_said():
    program = read_program("n", NESTED)
    (outer,) = program.loops
    unread, inner = outer.inner
    assert (outer.turns, outer.steps, outer.bundles) == (4, 4, 3)
    assert (unread.turns, unread.steps) == (None, None) and not unread.known
    assert (inner.turns, inner.bundles, inner.depth) == (3, 2, 2)
    assert not outer.known and not program.known
    assert program.cycles == 2 + 4 * (3 + 2 + 3 * 2)
    assert program.capacity == {} and program.utilization() == {}


def test_a_start_that_is_not_read_leaves_the_turns_unknown():
    program = read_program("n", NESTED.replace("%s1_s1 = smov 0", "%s1_s1 = sld [smem:[#a]]"))
    assert program.loops[0].turns is None


def test_a_start_other_than_zero_counts():
    program = read_program("n", NESTED.replace("%s9_s9 = smov 0", "%s9_s9 = smov 1"))
    assert program.loops[0].inner[1].turns == 2


# What follows a loop starts in its tail, and the jump back stands behind it.
TAIL = """\
   0x0   :  { %s1_s1 = smov 0 /* copy for cssa */ }
   0x1 LB: > { %s2_s2 = sadd.s32 1, %s3_s3  ;;  %s3_s3 = sphi %s1_s1, %s2_s2 }
   0x2   : > { %p5_p5 = scmp.ge.s32.totalorder %s2_s2, 9 /* loop exit test */ }
   0x3   :  { %7 = vst [vmem:[#allocation2] sm:$0xff] (%p5_p5), /*vst_source=*/%v6_v6 }
   0x4   : > { %v8 = vadd.f32 1.0, %v9 }
   0x5   :  { %v10 = vadd.f32 1.0, %v9 }
   0x6   :  { %11 = sbr.rel (!%p5_p5) target = $region1 }
   0x7   :  {}
   0x8   :  {} /* End region 4 */
   0x9   :  { %12 = vsyncpa [#allocation3], 1 }
"""


def test_a_loop_lasts_until_its_jump_back():
    program = read_program("t", TAIL)
    (loop,) = program.loops
    assert (loop.bundles, loop.turns, program.outside) == (8, 9, 2)


def test_a_listing_in_another_form_is_refused():
    with pytest.raises(ValueError, match="jaxquant reads those of 0.0.42"):
        read_program("n", "something else\n")


def test_a_folder_is_read_and_equal_code_is_shared(tmp_path):
    files = {
        "17-k.1-71-final_bundles.txt": PIPELINE,
        "17-k.1-70-schedule-analysis_final_bundles.txt": "Schedule analysis:\n",
        "17-k.1-69-final_hlo-static-per-bundle-utilization.txt": UNITS,
        "16-TLP-73-final_bundles.txt": NESTED,
        "16-<late-finalization>-68-final_bundles.txt": NESTED,
        "16-TLP-00-deduplication-map.txt": (
            "key:k.1\nordinal:3\nequivalent_hlos[size=2]:\n  k.1\n  k.7\n"
            "key:<late-initialization>\nordinal:0\nequivalent_hlos[size=0]:\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    schedule = read_schedule(tmp_path)
    assert set(schedule.programs) == {"k.1", "k.7"}
    assert schedule.programs["k.7"] == read_program("k.1", PIPELINE, UNITS)
    assert schedule.top_level is not None and schedule.top_level.bundles == 9


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="libtpu wrote no schedules"):
        read_schedule(tmp_path)


def _kernel(turns: int):
    def body(x_ref, out_ref):
        out_ref[...] = jax.lax.fori_loop(
            0, turns, lambda i, x: x * x + 1.0, x_ref[...], unroll=False
        )

    return body


def _call(semantics: str, *, inner: int):
    """A kernel of 16 steps of one block each."""
    block = _pallas.BlockSpec((256, 512), lambda i: (i, 0))
    return _pallas.tpu_call(
        _kernel(inner),
        name="squares",
        grid=(16,),
        semantics=(semantics,),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((4096, 512), jnp.float32),
        scratch=[],
        vmem_bytes=None,
        interpret=False,
    )


@pytest.mark.aot
@pytest.mark.parametrize("semantics", ["parallel", "arbitrary"])
@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e", "7x"])
def test_a_grid_is_split_over_the_cores_of_a_chip(name: str, semantics: str):
    target, _ = parse_target(name)
    x = jax.ShapeDtypeStruct((4096, 512), jnp.float32)
    out = compile_for(_call(semantics, inner=3), (x,), target)
    (step,) = (step for step in out.hlo.steps if step.kernel == "squares")
    program = out.schedule.programs[step.name]
    (pipeline,) = program.loops
    steps = 16 // target.cores if semantics == "parallel" else 16
    assert pipeline.steps == steps
    assert steps < pipeline.turns <= steps + 2
    # Neither the fill nor the drain runs the body.
    body = pipeline.bundles + sum(loop.cycles for loop in pipeline.inner)
    assert steps * body <= program.cycles < (steps + 1) * body + program.outside
    assert program.known and program.used["VALU"] > 0


@pytest.mark.aot
def test_a_loop_inside_a_kernel_is_read():
    target, _ = parse_target("v5e")
    x = jax.ShapeDtypeStruct((4096, 512), jnp.float32)
    programs = {
        turns: next(
            iter(
                compile_for(_call("parallel", inner=turns), (x,), target).schedule.programs.values()
            )
        )
        for turns in (100, 200)
    }
    for turns, program in programs.items():
        (pipeline,) = program.loops
        (inner,) = pipeline.inner
        assert (inner.depth, inner.turns) == (2, turns) and program.hottest.depth == 2
    assert programs[200].cycles / programs[100].cycles == pytest.approx(2, rel=0.05)
