"""A QArray as named parts, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized_trees import some_qarray, WEIGHTS

from jaxquant.checkpoint import _parts
from jaxquant.numerics import decode, FORMATS
from jaxquant.qarray import schemes

WANTED = {
    "int8/channel": {"codes", "scale"},
    "int8/zero": {"codes", "scale", "zero_point"},
    "nvfp4/groups": {"codes", "scale.codes", "scale.scale"},
    "nf4/double": {"codes", "scale.codes", "scale.scale", "scale.offset"},
}


@pytest.mark.parametrize("path", WEIGHTS)
def test_a_qarray_is_taken_apart_and_put_together(path: str):
    q = some_qarray(*WEIGHTS[path])
    parts = _parts.parts_of(q)
    assert set(parts) == WANTED.get(path, set(parts))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), q)
    back = _parts.with_parts(shapes, parts)
    assert jax.tree.structure(back) == jax.tree.structure(q)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True))


def test_codes_are_stored_in_their_own_bits():
    described = _parts.described(some_qarray(*WEIGHTS["int3/ragged"]), "00000")
    assert described["codes"].code_bits == 3 and described["codes"].bytes == -(-70 * 3 // 8)
    assert described["codes"].array == "00000.codes"
    assert described["scale"].code_bits is None
    described = _parts.described(some_qarray((64, 6), schemes.MXFP4), "00000")
    assert described["codes"].bytes == 32 * 6 and described["scale"].bytes == 2 * 6


@pytest.mark.parametrize("name", FORMATS)
def test_a_table_says_what_each_code_stands_for(name: str):
    format = FORMATS[name]
    table = _parts.table_of(format)
    if table is None:
        some = np.asarray([max(format.lowest, -1.0), 1.0]).astype(format.storage)
        np.testing.assert_array_equal(
            decode(jnp.asarray(some), format, jnp.float32), some.astype(np.float32)
        )
    else:
        codes = jnp.arange(len(table), dtype=jnp.uint8).astype(format.storage)
        np.testing.assert_array_equal(decode(codes, format, jnp.float32), np.float32(table))
