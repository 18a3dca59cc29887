"""The kernel against the product of what codes stand for, by formats, blocks and ragged ends.

The bound: a float32 sum of products of factors that are too large by `offset`, in any order, and
the sums of activations times `offset`, taken off again; half an ulp each.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.numerics import INT2, NF4, pack, UINT3
from jaxquant.ops.dot._mosaic_tpu_decode import Bias11, Cast, Lookup, Nibbles, Packed
from jaxquant.ops.dot._mosaic_tpu_weight import Blocks, Weight, weight_product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """Codes from `lowest` on, how they are stored and decoded; with zero points or without."""

    decoder: object
    lowest: int
    count: int
    dtype: object = None
    zero: bool = False
    exponents: bool = False

    def store(self, codes: np.ndarray):
        if isinstance(self.decoder, Packed):
            storage = jnp.asarray(codes, self.decoder.format.storage)
            return pack(storage, self.decoder.format, self.decoder.block)
        if self.dtype == jnp.float8_e4m3fn:
            return jnp.asarray(codes, jnp.uint8).view(self.dtype)
        return jnp.asarray(codes, jnp.int8).astype(self.dtype)

    def values(self, codes: np.ndarray) -> np.ndarray:
        if isinstance(self.decoder, Lookup):
            table = np.asarray(self.decoder.table, np.float32).astype(jnp.bfloat16)
            return table.astype(np.float64)[codes]
        if self.dtype == jnp.float8_e4m3fn:
            return codes.astype(np.uint8).view(jnp.float8_e4m3fn).astype(np.float64)
        return codes.astype(np.float64)


KINDS = {
    "int4": Kind(decoder=Nibbles(signed=True), lowest=-8, count=16, dtype=jnp.int4),
    "int4 cast": Kind(decoder=Cast(), lowest=-8, count=16, dtype=jnp.int4),
    "uint4 zero": Kind(
        decoder=Nibbles(signed=False), lowest=0, count=16, dtype=jnp.uint4, zero=True
    ),
    "uint4 zero cast": Kind(decoder=Cast(), lowest=0, count=16, dtype=jnp.uint4, zero=True),
    "int8": Kind(decoder=Cast(), lowest=-128, count=256, dtype=jnp.int8),
    "int3 zero": Kind(decoder=Packed(format=UINT3, block=1024), lowest=0, count=8, zero=True),
    "int2": Kind(decoder=Packed(format=INT2, block=512), lowest=-2, count=4),
    "nf4": Kind(decoder=Lookup(table=NF4.table or ()), lowest=0, count=16, dtype=jnp.uint4),
    "e4m3": Kind(decoder=Bias11(), lowest=0, count=127, dtype=jnp.float8_e4m3fn),
    "int4 exponents": Kind(
        decoder=Nibbles(signed=True), lowest=-8, count=16, dtype=jnp.int4, exponents=True
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    rows: int
    k: int
    n: int
    group: int
    blocks: Blocks


def _shape(rows: int, k: int, n: int, group: int, /, **blocks: int) -> Shape:
    given = {"rows": rows, "k": k, "n": n, "unit": 128, **blocks}
    given.setdefault("columns", given["n"])
    return Shape(rows=rows, k=k, n=n, group=group, blocks=Blocks(**given))


SHAPES = {
    "one row": _shape(1, 256, 1024, 128),
    "several blocks along k and n": _shape(16, 512, 2048, 128, k=256, n=1024),
    "columns a part at a time": _shape(8, 256, 2048, 128, columns=1024),
    "groups narrower than a unit": _shape(16, 256, 1024, 32),
    "groups of 64, units of 256": _shape(8, 512, 1024, 64, unit=256),
    "groups of several units": _shape(8, 512, 1024, 256, unit=128),
    "one group": _shape(8, 512, 1024, 512, k=256),
    "a last group that is short": _shape(5, 576, 1024, 128, unit=64),
    "rows in tiles, the last one short": _shape(40, 256, 1024, 128, rows=16),
    "columns that end within a block": _shape(8, 256, 1536, 128, n=1024),
    "two cores": _shape(8, 512, 2048, 128, k=256, n=1024, cores=2),
}


def _unfit(kind: Kind, shape: Shape) -> str | None:
    if shape.blocks.unit % kind.decoder.least_unit:
        return f"its units are multiples of {kind.decoder.least_unit}"
    if shape.n % kind.decoder.least_columns:
        return f"its columns come in blocks of {kind.decoder.least_columns}"
    return None


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_product_is_that_of_what_codes_stand_for(kind: Kind, shape: Shape, dtype):
    reason = _unfit(kind, shape)
    if reason is not None:
        pytest.skip(reason)
    rng = np.random.default_rng(1)
    groups = -(-shape.k // shape.group)
    codes = rng.integers(kind.lowest, kind.lowest + kind.count, (shape.k, shape.n))
    x = jnp.asarray(rng.normal(size=(shape.rows, shape.k)), dtype)
    exponents = rng.integers(120, 130, (groups, shape.n))
    scale = rng.uniform(0.5, 2.0, (groups, shape.n)).astype(np.float32)
    scale = 2.0 ** (exponents - 127.0) if kind.exponents else scale
    zeros = (
        rng.integers(0, kind.count, (groups, shape.n)) if kind.zero else np.zeros_like(exponents)
    )
    bias = rng.normal(size=shape.n).astype(np.float32)
    got = weight_product(
        x,
        kind.store(codes),
        jnp.asarray(exponents, jnp.uint8) if kind.exponents else jnp.asarray(scale, jnp.float32),
        jnp.asarray(zeros, jnp.uint8) if kind.zero else None,
        jnp.asarray(bias),
        weight=Weight(
            k=shape.k,
            n=shape.n,
            group=shape.group,
            decoder=kind.decoder,
            exponents=kind.exponents,
        ),
        blocks=shape.blocks,
        out_dtype=jnp.float32,
        interpret=True,
    )
    tall = [np.repeat(part, shape.group, axis=0)[: shape.k] for part in (zeros, scale)]
    centered = kind.values(codes) - tall[0]
    rows = np.asarray(x).astype(np.float64)
    expected = rows @ (centered * tall[1]) + bias
    offset = kind.decoder.offset + np.abs(tall[0])
    magnitude = np.abs(rows) @ ((np.abs(centered) + 2 * offset) * tall[1]) + np.abs(bias)
    assert got.shape == expected.shape
    # Interpreted, what a kernel does not write stays NaN, as do rows and columns beyond the ends.
    assert (np.abs(np.asarray(got) - expected) <= (shape.k + 8) * 2.0**-24 * magnitude).all()


def test_a_row_with_nan_is_nan_and_the_others_are_not():
    kind, shape = KINDS["uint4 zero"], SHAPES["one row"]
    codes = np.random.default_rng(0).integers(0, 16, (256, 1024))
    x = jnp.ones((3, 256), jnp.bfloat16).at[1, 77].set(jnp.nan)
    y = weight_product(
        x,
        kind.store(codes),
        jnp.ones((2, 1024), jnp.bfloat16),
        jnp.zeros((2, 1024), jnp.uint4),
        None,
        weight=Weight(k=256, n=1024, group=128, decoder=kind.decoder),
        blocks=dataclasses.replace(shape.blocks, rows=3),
        out_dtype=jnp.bfloat16,
        interpret=True,
    )
    lost = np.isnan(np.asarray(y).astype(np.float32))
    assert lost[1].all() and not lost[[0, 2]].any()


def test_a_layer_of_a_stack_is_read_where_it_lies():
    kind = KINDS["uint4 zero"]
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (3, 256, 1024))
    scale = jnp.asarray(rng.uniform(0.5, 2.0, (3, 2, 1024)), jnp.float32)
    zeros = jnp.asarray(rng.integers(0, 16, (3, 2, 1024)), jnp.uint4)
    x = jnp.asarray(rng.normal(size=(4, 256)), jnp.float32)
    stored = jnp.stack([kind.store(layer) for layer in codes])
    product = functools.partial(
        weight_product,
        bias=None,
        weight=Weight(k=256, n=1024, group=128, decoder=kind.decoder),
        blocks=Blocks(rows=4, k=128, n=512, unit=128, columns=512),
        out_dtype=jnp.float32,
        interpret=True,
    )

    @jax.jit
    def each(layer):
        return product(x, stored, scale, zeros, layer=layer)

    for i in range(3):
        alone = product(x, stored[i], scale[i], zeros[i])
        # The same sums, perhaps in another order: factors of 31 and offsets of 31, scales of 2.
        magnitude = float(jnp.abs(x).sum(axis=1).max()) * (31 + 2 * 31) * 2
        allowed = 264 * 2.0**-24 * magnitude
        np.testing.assert_allclose(each(jnp.asarray(i, jnp.int32)), alone, rtol=0, atol=allowed)
