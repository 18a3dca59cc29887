"""Instructions and shapes are read as XLA prints them."""

import pytest

from jaxquant.aot._hlo_text import read_module, read_shapes

MODULE = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (param_0: f32[8,128]) -> f32[8,128] {
  %param_0 = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %add.1 = f32[8,128]{1,0:T(8,128)} add(%param_0, %param_0), metadata={op_name="jit(f)/add"}
}

ENTRY %main.3 (x.1: f32[8,128], y: s32[]) -> (f32[8,128], f32[8,128]) {
  %y = s32[]{:T(128)} parameter(1)
  %x.1 = f32[8,128]{1,0:T(8,128)} parameter(0), sharding={replicated}
  %copy-start = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x.1)
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %seven = s32[]{:T(128)} constant(7)
  %fusion = f32[8,128]{1,0:T(8,128)} fusion(%copy-done), kind=kLoop, calls=%fused
  ROOT %tuple = (f32[8,128]{1,0:T(8,128)}, /*index=1*/f32[8,128]{1,0:T(8,128)}) tuple(%fusion, %x.1)
}
"""


def test_a_module_is_read():
    module = read_module(MODULE)
    assert module.entry == "main.3" and set(module.computations) == {"main.3", "fused"}
    main = module.computations["main.3"]
    assert [each.opcode for each in main.instructions.values()] == [
        *("parameter", "parameter", "copy-start", "copy-done", "constant", "fusion", "tuple")
    ]
    assert [each.name for each in main.parameters] == ["x.1", "y"]
    assert main.root.operands == ("fusion", "x.1")
    assert main.instructions["fusion"].names("calls") == ("fused",)
    assert main.instructions["seven"].literal == "7"
    assert [s.space for s in main.instructions["copy-start"].shapes] == [1, 0, 2]
    assert [user.name for user in main.users["x.1"]] == ["copy-start", "tuple"]
    assert module.computations["fused"].root.quoted("op_name") == "jit(f)/add"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[16,4096]{1,0:T(8,128)}", 16 * 4096 * 4),
        ("bf16[3,100]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),
        ("bf16[3,100]{0,1:T(8,128)(2,1)}", 104 * 128 * 2),
        ("s4[4096,4096]{1,0:T(64,128)(8,1)E(4)}", 4096 * 4096 // 2),
        ("s4[4096,4096]{1,0}", 4096 * 4096 // 2),
        ("f8e4m3fn[7]{0}", 7),
        ("pred[9]{0}", 9),
        ("f32[4096]{0:T(1024)S(1)}", 4096 * 4),
        ("f32[]", 4),
        ("token[]", 0),
    ],
)
def test_bytes_are_those_of_the_layout(text, size):
    (shape,) = read_shapes(text)
    assert shape.bytes == size


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="not an HLO module"):
        read_module("HloModule jit_f\n")
