"""Which exchanges carry weights: by hand, through fusions, loops and tuples."""

import pytest

from jaxquant.aot._provenance import carriers_of_weights

HLO = """HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.9 = f32[] add(%a, %b)
}

%wide (p: s8[64,8]) -> bf16[64,8] {
  %p = s8[64,8]{1,0} parameter(0)
  ROOT %convert.1 = bf16[64,8]{1,0} convert(%p)
}

%inside (p.1: bf16[64,8], q.1: bf16[64,8]) -> bf16[64,64] {
  %p.1 = bf16[64,8]{1,0} parameter(0)
  %q.1 = bf16[64,8]{1,0} parameter(1)
  ROOT %all-gather.7 = bf16[64,64]{1,0} all-gather(%p.1), dimensions={1}
}

%test (t: (s32[], bf16[64,8], bf16[64,8])) -> pred[] {
  %t = (s32[], bf16[64,8], bf16[64,8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(4)
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}

%body (t.2: (s32[], bf16[64,8], bf16[64,8])) -> (s32[], bf16[64,8], bf16[64,8]) {
  %t.2 = (s32[], bf16[64,8], bf16[64,8]) parameter(0)
  %i.2 = s32[] get-tuple-element(%t.2), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i.2, %one)
  %w.2 = bf16[64,8]{1,0} get-tuple-element(%t.2), index=1
  %x.2 = bf16[64,8]{1,0} get-tuple-element(%t.2), index=2
  %all-gather.3 = bf16[64,64]{1,0} all-gather(%w.2), dimensions={1}
  %all-gather.4 = bf16[64,64]{1,0} all-gather(%x.2), dimensions={1}
  %y.2 = bf16[64,8]{1,0} add(%x.2, %w.2)
  ROOT %out.2 = (s32[], bf16[64,8], bf16[64,8]) tuple(%next, %w.2, %y.2)
}

ENTRY %main (w: s8[64,8], x: bf16[64,8]) -> bf16[64,64] {
  %w = s8[64,8]{1,0} parameter(0), metadata={op_name="weights[\\'a\\'].codes"}
  %x = bf16[64,8]{1,0} parameter(1), metadata={op_name="tokens"}
  %fusion.1 = bf16[64,8]{1,0} fusion(%w), kind=kLoop, calls=%wide
  %all-gather.1 = bf16[64,64]{1,0} all-gather(%fusion.1), dimensions={1}
  %mixed = bf16[64,8]{1,0} multiply(%fusion.1, %x)
  %all-gather.2 = bf16[64,64]{1,0} all-gather(%mixed), dimensions={1}
  %both = (bf16[64,64], bf16[64,64]) all-gather(%x, %fusion.1), dimensions={1}
  %all-reduce.1 = f32[] all-reduce(%mixed), to_apply=%sum
  %gathered = bf16[64,64]{1,0} fusion(%fusion.1, %x), kind=kCustom, calls=%inside
  %other = bf16[64,64]{1,0} fusion(%x, %fusion.1), kind=kCustom, calls=%inside
  %zero = s32[] constant(0)
  %start = (s32[], bf16[64,8], bf16[64,8]) tuple(%zero, %fusion.1, %x)
  %loop = (s32[], bf16[64,8], bf16[64,8]) while(%start), condition=%test, body=%body
  %last = bf16[64,8]{1,0} get-tuple-element(%loop), index=2
  ROOT %all-gather.5 = bf16[64,64]{1,0} all-gather(%last), dimensions={1}
}
"""


def test_what_depends_on_weights_alone_is_weights():
    found = carriers_of_weights(HLO, lambda name: name.startswith("weights"))
    # `both` sends activations too; `gathered` is a fusion that gathers its first operand.
    assert found == {"all-gather.1", "both", "gathered", "all-gather.3"}


def test_a_loop_that_mixes_is_followed_to_its_end():
    # A carry that starts as a weight and takes activations in is no weight from the second turn on,
    # but it is gathered in the first.
    mixed = HLO.replace("tuple(%zero, %fusion.1, %x)", "tuple(%zero, %x, %fusion.1)")
    found = carriers_of_weights(mixed, lambda name: name.startswith("weights"))
    assert "all-gather.3" not in found
    assert "all-gather.4" in found


def test_a_program_without_weights_is_no_program_of_a_model():
    with pytest.raises(ValueError, match="None of the 2 arguments.*tokens"):
        carriers_of_weights(HLO, lambda name: name.startswith("parameters"))
