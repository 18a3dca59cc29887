"""Bytes, collectives and loops are counted as the HLO says."""

import pytest

from jaxquant.aot import hlo_facts

SCAN = """\
HloModule jit_f

%cond (p: (s32[], f32[8,128], f32[7,8,128])) -> pred[] {
  %p = (s32[], f32[8,128], f32[7,8,128]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%slice_add (a: f32[8,128], stack: f32[7,8,128], j: s32[]) -> f32[8,128] {
  %a = f32[8,128] parameter(0)
  %stack = f32[7,8,128] parameter(1)
  %j = s32[] parameter(2)
  %z = s32[] constant(0)
  %row = f32[1,8,128] dynamic-slice(%stack, %j, %z, %z), dynamic_slice_sizes={1,8,128}
  %flat = f32[8,128] bitcast(%row)
  ROOT %sum = f32[8,128] add(%a, %flat)
}

%body (q: (s32[], f32[8,128], f32[7,8,128])) -> (s32[], f32[8,128], f32[7,8,128]) {
  %q = (s32[], f32[8,128], f32[7,8,128]) parameter(0)
  %k = s32[] get-tuple-element(%q), index=0
  %c = f32[8,128] get-tuple-element(%q), index=1
  %w = f32[7,8,128] get-tuple-element(%q), index=2
  %one = s32[] constant(1)
  %next = s32[]{:S(6)} add(%k, %one)
  %fusion.1 = f32[8,128] fusion(%c, %w, %k), kind=kLoop, calls=%slice_add
  ROOT %t = (s32[], f32[8,128], f32[7,8,128]) tuple(%next, %fusion.1, %w)
}

ENTRY %main (x: f32[8,128], ws: f32[7,8,128]) -> f32[8,128] {
  %x = f32[8,128] parameter(0)
  %ws = f32[7,8,128] parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], f32[8,128], f32[7,8,128]) tuple(%zero, %x, %ws)
  %while = (s32[], f32[8,128], f32[7,8,128]) while(%init), condition=%cond, body=%body
  ROOT %out = f32[8,128] get-tuple-element(%while), index=1
}
"""
ROW = 8 * 128 * 4


def _step(facts, name):
    (step,) = (each for each in facts.steps if each.name == name)
    return step


def test_a_loop_over_stacked_weights_reads_each_slice_once():
    facts = hlo_facts(SCAN)
    step = _step(facts, "fusion.1")
    assert (step.runs, step.read, step.written) == (7, 2 * ROW + 4, ROW)
    assert not facts.unknown_loops and facts.fusions == 1


def test_a_loop_that_starts_elsewhere_has_fewer_turns():
    text = SCAN.replace("%zero = s32[] constant(0)", "%zero = s32[] constant(3)")
    assert _step(hlo_facts(text), "fusion.1").runs == 4


def test_a_count_that_xla_knows_is_taken():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    assert _step(hlo_facts(SCAN.replace("body=%body", known)), "fusion.1").runs == 5


def test_a_loop_whose_turns_are_not_told_is_named_and_counted_once():
    facts = hlo_facts(SCAN.replace("%n = s32[] constant(7)", "%n = s32[] custom-call(%i)"))
    assert facts.unknown_loops == ("while",)
    assert _step(facts, "fusion.1").runs == 1


def _entry(*lines: str, before: str = "") -> str:
    return f"HloModule m\n\n{before}\nENTRY %main () -> f32[] {{\n" + "\n".join(lines) + "\n}\n"


def test_memory_on_the_chip_is_not_counted_and_a_fetch_is_once():
    facts = hlo_facts(
        _entry(
            "  %x = f32[8,128]{1,0:T(8,128)} parameter(0)",
            "  %s = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) "
            "copy-start(%x)",
            "  %d = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%s)",
            "  ROOT %n = f32[8,128]{1,0:T(8,128)} negate(%d)",
        )
    )
    assert [(step.name, step.read, step.written, step.on_chip) for step in facts.steps] == [
        ("s", ROW, 0, ROW),
        ("n", 0, ROW, ROW),
    ]
    assert (facts.bytes_moved, facts.bytes_on_chip) == (2 * ROW, 2 * ROW)


def test_a_slice_that_is_fetched_ahead_reads_what_it_takes():
    facts = hlo_facts(
        _entry(
            "  %x = f32[64,8,128] parameter(0)",
            "  %s = ((f32[64,8,128]), f32[1,8,128]{2,1,0:S(1)}, u32[]{:S(2)}) slice-start(%x), "
            "slice={[3:4], [0:8], [0:128]}",
            "  %d = f32[1,8,128]{2,1,0:S(1)} slice-done(%s)",
            "  ROOT %n = f32[1,8,128] negate(%d)",
        )
    )
    assert [(step.name, step.read, step.written) for step in facts.steps] == [
        ("s", ROW, 0),
        ("n", 0, ROW),
    ]


def test_an_update_in_place_writes_the_update():
    update = (
        "%put (c: f32[64,8,128], u: f32[1,8,128], i: s32[]) -> f32[64,8,128] {\n"
        "  %c = f32[64,8,128] parameter(0)\n"
        "  %u = f32[1,8,128] parameter(1)\n"
        "  %i = s32[] parameter(2)\n"
        "  ROOT %put.1 = f32[64,8,128] dynamic-update-slice(%c, %u, %i, %i, %i)\n}\n"
    )
    lines = [
        "  %cache = f32[64,8,128] parameter(0)",
        "  %row = f32[1,8,128] parameter(1)",
        "  %at = s32[] parameter(2)",
    ]
    fused = "  ROOT %f = f32[64,8,128] fusion(%cache, %row, %at), kind=kLoop, calls=%put"
    alone = "  ROOT %f = f32[64,8,128] dynamic-update-slice(%cache, %row, %at, %at, %at)"
    assert _step(hlo_facts(_entry(*lines, fused, before=update)), "f").bytes == 2 * ROW + 4
    assert _step(hlo_facts(_entry(*lines, alone)), "f").bytes == 2 * ROW + 12


def test_a_fusion_inside_that_hands_its_operand_on_reads_it():
    inside = (
        "%same (a: f32[8,128]) -> f32[1024] {\n  %a = f32[8,128] parameter(0)\n"
        "  ROOT %b = f32[1024] bitcast(%a)\n}\n\n"
        "%outer (c: f32[8,128]) -> f32[1024] {\n  %c = f32[8,128] parameter(0)\n"
        "  %d = f32[1024] fusion(%c), kind=kLoop, calls=%same\n"
        "  ROOT %e = f32[1024] negate(%d)\n}\n"
    )
    facts = hlo_facts(
        _entry(
            "  %x = f32[8,128] parameter(0)",
            "  ROOT %f = f32[1024] fusion(%x), kind=kLoop, calls=%outer",
            before=inside,
        )
    )
    assert facts.bytes_moved == 2 * ROW


def test_a_gather_reads_what_it_takes():
    facts = hlo_facts(
        _entry(
            "  %table = f32[1000,128] parameter(0)",
            "  %ids = s32[8] parameter(1)",
            "  ROOT %g = f32[8,128] gather(%table, %ids), offset_dims={1}",
        )
    )
    assert facts.bytes_moved == 2 * ROW + 8 * 4


COLLECTIVES = _entry(
    "  %x = bf16[2,128] parameter(0)",
    "  %ags = (bf16[2,128], bf16[16,128]) all-gather-start(%x), dimensions={0}",
    "  %ag = bf16[16,128] all-gather-done(%ags)",
    "  %ar = bf16[16,128] all-reduce(%ag), to_apply=%add",
    "  %rs = bf16[2,128] fusion(%ar), kind=kCustom, calls=%all-reduce-scatter",
    "  %cps = (bf16[2,128], bf16[2,128], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%rs)",
    "  ROOT %cp = bf16[2,128] collective-permute-done(%cps)",
    before=(
        "%all-reduce-scatter (i: bf16[16,128]) -> bf16[2,128] {\n"
        "  %i = bf16[16,128] parameter(0)\n"
        "  %inner = bf16[16,128] all-reduce(%i), to_apply=%add\n"
        "  %zero = s32[] constant(0)\n"
        "  ROOT %mine = bf16[2,128] dynamic-slice(%inner, %zero, %zero)\n}\n"
    ),
)


def test_collectives_are_counted_once_each():
    facts = hlo_facts(COLLECTIVES)
    assert [(each.kind, each.name, each.bytes) for each in facts.collectives] == [
        ("all-gather", "ags", 16 * 128 * 2),
        ("all-reduce", "ar", 16 * 128 * 2),
        ("reduce-scatter", "rs", 16 * 128 * 2),
        ("collective-permute", "cps", 2 * 128 * 2),
    ]
    assert facts.collective_bytes()["all-gather"] == 16 * 128 * 2
    small, large = 2 * 128 * 2, 16 * 128 * 2
    assert _step(facts, "ags").bytes == small + large
    assert _step(facts, "cps").bytes == 2 * small


def test_a_collective_spread_over_fusions_is_counted_where_it_begins():
    """As the TPU compiler writes an asynchronous one: buffers go from fusion to fusion."""
    begun = 'channel_id=3, dimensions={0}, frontend_attributes={chain_id="0"}'
    facts = hlo_facts(
        _entry(
            "  %x = bf16[2,128] parameter(0)",
            "  %y = f32[8,128] parameter(1)",
            "  %s = (bf16[2,128], bf16[16,128]) fusion(%x), kind=kCustom, calls=%start",
            "  %p = bf16[2,128] get-tuple-element(%s), index=0",
            "  %o = bf16[16,128] get-tuple-element(%s), index=1",
            "  %t = (f32[8,128], bf16[2,128], bf16[16,128]) fusion(%y, %p, %o), kind=kCustom, "
            "calls=%meanwhile",
            "  ROOT %z = f32[8,128] get-tuple-element(%t), index=0",
            before=(
                "%start (i: bf16[2,128]) -> (bf16[2,128], bf16[16,128]) {\n"
                "  %i = bf16[2,128] parameter(0)\n"
                f"  %ag = bf16[16,128] all-gather(%i), {begun}\n"
                "  ROOT %c = (bf16[2,128], bf16[16,128]) custom-call(%ag), "
                'custom_call_target="AsyncCollectiveStart"\n}\n\n'
                "%meanwhile (a: f32[8,128], b: bf16[2,128], c: bf16[16,128]) -> "
                "(f32[8,128], bf16[2,128], bf16[16,128]) {\n"
                "  %a = f32[8,128] parameter(0)\n  %b = bf16[2,128] parameter(1)\n"
                "  %d = bf16[16,128] parameter(2)\n  %e = f32[8,128] negate(%a)\n"
                f"  %ag2 = bf16[16,128] all-gather(%b), {begun}\n"
                "  ROOT %r = (f32[8,128], bf16[2,128], bf16[16,128]) tuple(%e, %b, %ag2)\n}\n"
            ),
        )
    )
    (gathered,) = facts.collectives
    assert (gathered.kind, gathered.name, gathered.bytes) == ("all-gather", "s", 16 * 128 * 2)
    assert _step(facts, "t").bytes == 2 * ROW


def test_a_collective_that_another_core_runs_is_found():
    called = (
        "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n"
        "  %b = f32[] parameter(1)\n  ROOT %c = f32[] add(%a, %b)\n}\n\n"
        "%sum (i: f32[8,128]) -> f32[8,128] {\n  %i = f32[8,128] parameter(0)\n"
        "  ROOT %o = f32[8,128] all-reduce(%i), to_apply=%add\n}\n"
    )
    facts = hlo_facts(
        _entry(
            "  %x = f32[8,128] parameter(0)",
            "  %s = ((f32[8,128], token[]), f32[8,128]) call-start(%x, %t), "
            'async_execution_thread="sparsecore", to_apply=%sum',
            "  ROOT %d = f32[8,128] call-done(%s)",
            before=called,
        )
    )
    (sum_,) = facts.collectives
    assert (sum_.kind, sum_.name, sum_.bytes) == ("all-reduce", "s", ROW)
    assert facts.bytes_moved == 2 * ROW


KERNEL = _entry(
    "  %x = s4[64,128]{1,0:T(64,128)(8,1)E(4)} parameter(0)",
    '  %k.1 = f32[8,128] custom-call(%x), custom_call_target="tpu_custom_call", '
    'metadata={op_name="jit(f)/int4_dot/pallas_call"}',
    '  ROOT %t = f32[8,128] custom-call(%k.1), custom_call_target="Sharding"',
)


def test_a_kernel_is_named_and_its_bytes_can_be_given():
    facts = hlo_facts(KERNEL)
    assert facts.custom_calls == {"int4_dot": 1, "Sharding": 1}
    assert _step(facts, "k.1").bytes == 64 * 128 // 2 + ROW
    assert _step(hlo_facts(KERNEL, {"int4_dot": 123}), "k.1").bytes == 123


def test_bytes_of_a_kernel_that_does_not_run_are_refused():
    with pytest.raises(ValueError, match=r"the kernels \['other'\].*'int4_dot'"):
        hlo_facts(KERNEL, {"other": 1})


def test_of_two_branches_the_one_that_moves_more_counts():
    branches = (
        "%small (a: f32[8,128]) -> f32[8,128] {\n  %a = f32[8,128] parameter(0)\n"
        "  ROOT %n1 = f32[8,128] negate(%a)\n}\n\n"
        "%large (b: f32[8,128]) -> f32[8,128] {\n  %b = f32[8,128] parameter(0)\n"
        "  %n2 = f32[8,128] negate(%b)\n  ROOT %n3 = f32[8,128] negate(%n2)\n}\n"
    )
    facts = hlo_facts(
        _entry(
            "  %p = pred[] parameter(0)",
            "  %x = f32[8,128] parameter(1)",
            "  ROOT %c = f32[8,128] conditional(%p, %x, %x), true_computation=%small, "
            "false_computation=%large",
            before=branches,
        )
    )
    assert [step.name for step in facts.steps] == ["n2", "n3"]


def test_a_kernel_that_reads_a_part_of_an_operand_says_so():
    text = _entry(
        "  %x = s4[8,64,128]{2,1,0:T(64,128)(8,1)E(4)} parameter(0)",
        '  ROOT %k = f32[8,128] custom-call(%x), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"9","transcendentals":"0",'
        '"bytes_accessed":"8192"}}}',
    )
    step = _step(hlo_facts(text), "k")
    assert (step.read, step.written) == (64 * 128 // 2, ROW)
