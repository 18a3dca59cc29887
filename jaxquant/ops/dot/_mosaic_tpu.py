"""The dot on TPU, by kernels for Mosaic: which calls they take, and in what blocks.

Weights are read as they are stored, `[k, n]`: 4-bit codes in the dtypes that XLA packs on TPU, 1 to
3 bits packed along `n` (`jaxquant.prepare` does it). Blocks and what the kernels win are data, in
`_mosaic_tpu_tables.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...numerics import BFLOAT16, E2M1, E4M3, E5M2, E8M0, FLOAT32, Format
from ...qarray import CANONICAL, Layout, QArray, Scheme
from ...qarray._layout import order_of
from . import _mosaic_tpu_pairs as pairs, _mosaic_tpu_tables as tables
from ._call import DotCall, Layer
from ._gemm import as_gemm, outputs_first, refuses_shape, scale_per_output, weight_side
from ._grad import product
from ._mosaic_tpu_blocks import blocks_for
from ._mosaic_tpu_decode import Bias11, Cast, Decoder, Lookup, Nibbles, Packed
from ._mosaic_tpu_weight import Blocks, TERMS, Weight, weight_product
from ._partition import cut_of, dealt_out, local_weight

_READY_SCALES = (FLOAT32, BFLOAT16, E8M0)
"""Formats of scales that the kernel reads as they are stored; others are made float32 before."""
_CAST = (E4M3, E5M2)


def refuses(call: DotCall) -> str | None:
    """Why not, or `None`."""
    if call.platform != "tpu" and not call.interpret:
        return f"it is for TPUs, and this is a {call.platform}"
    reason = refuses_shape(call)
    if reason is not None:
        return reason
    side = weight_side(call)
    assert side is not None
    x, w = (call.lhs, call.rhs)[1 - side], (call.lhs, call.rhs)[side]
    if isinstance(x, QArray) or call.activations is not None:
        return pairs.refuses(call)
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"activations are {x.dtype}, not float32 or bfloat16"
    if outputs_first(call):
        return "the weight is stored by output; `jaxquant.prepare` stores it by input"
    if isinstance(w.scheme.scale, Scheme):
        return "scales that are held as codes are not read"
    rows, cut, summed = call.rows(1 - side), cut_of(call), call.contracted[side][0]
    if isinstance(cut, str):
        return cut
    if cut is not None:
        w = local_weight(w, cut, summed)
        if isinstance(w, str):
            return w
        rows //= cut.count(cut.rows)
    decoder = _decoder(w, tables.generation(call))
    if isinstance(decoder, str):
        return decoder
    if isinstance(decoder, Lookup) and x.dtype == jnp.float32 and not _exact(w.scheme.values):
        return f"bfloat16 does not hold the table of {w.scheme.values}, and activations are float32"
    weight = _weight(w, decoder)
    blocks = blocks_for(rows, weight, w.scheme.values.bits)
    if isinstance(blocks, str):
        return blocks
    return _refuses_memory(blocks, weight, x.dtype, tables.generation(call))


def rounds(call: DotCall) -> bool:
    """Whether the plain side is rounded to `call.activations` inside the product."""
    return refuses_shape(call) is None and pairs.refuses_rounding(call) is None


def _refuses_memory(blocks: Blocks, weight: Weight, dtype: Any, generation: int) -> str | None:
    """Why activations that are kept for several steps along `k` do not fit, or `None`."""
    terms = TERMS if dtype == jnp.float32 else 1
    kept, most = 2 * terms * blocks.rows * weight.k, tables.VECTOR_MEMORY[generation][0] // 2
    if blocks.k == weight.k or kept <= most:
        return None
    return (
        f"{blocks.rows} rows of {weight.k} activations in {dtype} take {kept} bytes of a core's "
        f"memory, of which they may take {most}"
    )


def loses(call: DotCall) -> str | None:
    """Why XLA is as fast though the kernel would take the call, or `None`."""
    if call.interpret:
        return None
    side = weight_side(call)
    assert side is not None
    w = (call.lhs, call.rhs)[side]
    if _both(call):
        return pairs.loses(call)
    generation, rows = tables.generation(call), call.rows(1 - side)
    most = tables.most_rows(generation, w.scheme.values)
    if rows > most:
        return (
            f"on TPU generation {generation} the kernel for {w.scheme.values} is scheduled "
            f"to win up to {most} rows, and there are {rows}"
        )
    return None


def run(call: DotCall) -> Float[Array, "..."]:
    """The product, by the kernel for what the weight holds."""
    if _both(call):
        return pairs.run(call)
    gemm, cut = as_gemm(call), cut_of(call)
    side = weight_side(call)
    assert side is not None and not isinstance(cut, str)
    summed = call.contracted[side][0]
    multiply = functools.partial(
        _multiply,
        generation=tables.generation(call),
        cores=call.device.cores,
        interpret=call.interpret,
    )
    if cut is None:

        def kernel(x: Any, w: QArray, *layer: Layer) -> Array:
            return multiply(x, w, call.out_dtype, *layer)
    else:
        kernel = dealt_out(multiply, cut, summed, call.out_dtype)
    layer = call.layer if _stacks(call.layer, gemm.w) else None
    y = product(kernel, gemm.x, gemm.w, layer, summed=summed, precision=call.precision)
    return gemm.finish(y)


def _stacks(layer: Layer | None, w: QArray) -> bool:
    """Whether a weight can be read where it lies in a stack: all of it as it is stored."""
    if layer is None or not _as_stored(w) or w.codes.dtype == E2M1.storage:
        return False
    pairs = zip(jax.tree.leaves(layer.stack), jax.tree.leaves(w), strict=True)
    return layer.stack.layout == w.layout and all(a.shape[1:] == b.shape for a, b in pairs)


def layout_for(w: QArray, contracted: tuple[int, ...], stack: tuple[int, ...]) -> Layout:
    """The layout that this backend reads: stack axes, then contracted, then kept."""
    kept = tuple(a for a in range(w.ndim) if a not in contracted and a not in stack)
    if len(kept) != 1 or len(contracted) != 1:
        return CANONICAL
    order = order_of((*stack, *contracted, *kept))
    block = _packing(w.scheme.values)
    if block is not None and w.shape[kept[0]] % block == 0:
        return Layout(order=order, packed=block)
    return Layout(order=order)


def _both(call: DotCall) -> bool:
    """Whether codes are multiplied by codes."""
    side = weight_side(call)
    assert side is not None
    return call.activations is not None or isinstance((call.lhs, call.rhs)[1 - side], QArray)


def _packing(values: Format) -> int | None:
    """In blocks of how many codes a format is packed along `n`; `None`: it is not."""
    if not values.integer or values.bits > 3:
        return None
    # The smallest parts fill whole registers of 128 columns.
    return 128 * 8 // min(w for w in (4, 2, 1) if values.bits & w)


def _decoder(w: QArray, generation: int) -> Decoder | str:
    """How codes become factors, or why they do not."""
    values, packed, block = w.scheme.values, w.layout.packed, _packing(w.scheme.values)
    if block is not None:
        if packed != block:
            return (
                f"codes of {values} are read in packed blocks of {block} outputs, which "
                "`jaxquant.prepare` makes where they divide the outputs"
            )
        return Packed(format=values, block=block)
    if packed is not None or w.layout.wide:
        return f"codes of {values} are read unpacked, as `jaxquant.prepare` stores them"
    if values == E4M3 and generation in tables.MULTIPLIES_E4M3_BIAS_11:
        return Bias11()
    if values.integer and values.bits == 8 or values in _CAST:
        return Cast()
    if values.integer and values.bits == 4:
        small = w.stored_shape[0] % Nibbles(signed=False).least_unit != 0
        cast = generation in tables.CONVERTS_FOUR_BITS or small
        return Cast() if cast else Nibbles(signed=values.signed)
    table = E2M1_VALUES if values == E2M1 else values.table
    if table is not None and values.bits == 4:
        return Lookup(table=table)
    return f"there is no decoder for codes of {values}"


# By the bits of a code: OCP MX v1.0, section 5.3.3.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = (*_E2M1_MAGNITUDES, *(-v for v in _E2M1_MAGNITUDES))


def _exact(values: Format) -> bool:
    return values.exact_in(BFLOAT16.storage)


def _weight(w: QArray, decoder: Decoder) -> Weight:
    (k, n), zero = w.stored_shape, w.scheme.zero_point
    exponents = _as_stored(w) and w.scheme.scale == E8M0
    # Mosaic wants no more of 16 bits than of 32; where rows do not fill registers, half as many.
    rows = 256 // min(8 if exponents else 32, 32 if zero is None else _bits(zero))
    while rows > 8 and w.scale.shape[0] % rows:
        rows //= 2
    return Weight(
        k=k,
        n=n,
        group=w.stored_tile[0],
        decoder=decoder,
        exponents=exponents,
        register_groups=rows,
    )


def _bits(format: Format) -> int:
    """What one number of a format takes up in a register, where 4-bit integers have a dtype."""
    if format.integer:
        return 4 if format.bits == 4 else 8
    return 32


def _as_stored(w: QArray) -> bool:
    """Whether the kernel reads scales as they are stored: one an output, in a format it knows."""
    return w.scheme.scale in _READY_SCALES and w.scale.shape[-1] == w.stored_shape[-1]


def _multiply(
    x: Float[Array, "rows k"],
    w: QArray,
    out_dtype: Any,
    layer: Layer | None = None,
    *,
    generation: int,
    cores: int,
    interpret: bool,
) -> Float[Array, "rows n"]:
    decoder = _decoder(w, generation)
    assert not isinstance(decoder, str)
    weight = _weight(w, decoder)
    blocks = blocks_for(x.shape[0], weight, w.scheme.values.bits, cores)
    assert not isinstance(blocks, str)
    rows = x.shape[0]
    if rows % 8 and (x.dtype == jnp.float32 or blocks.unit > weight.group or blocks.unit % 128):
        # Rows that stand below each other have to fill registers, or Mosaic does not compile it.
        x = jnp.pad(x, ((0, -rows % 8), (0, 0)))
        blocks = blocks_for(x.shape[0], weight, w.scheme.values.bits, cores)
        assert not isinstance(blocks, str)
    held = w if layer is None else layer.stack
    y = weight_product(
        x,
        held.codes,
        _plain_scale(held),
        _plain_zero_point(held),
        None,
        weight=weight,
        blocks=blocks,
        out_dtype=out_dtype,
        layer=None if layer is None else layer.index,
        vmem_bytes=tables.VECTOR_MEMORY[generation][1],
        interpret=interpret,
    )
    return y[:rows]


def _plain_scale(w: QArray) -> Array:
    if not _as_stored(w):
        return scale_per_output(w, outputs_first=False)
    return lax.bitcast_convert_type(w.scale, jnp.uint8) if w.scheme.scale == E8M0 else w.scale


def _plain_zero_point(w: QArray) -> Array | None:
    zero = w.zero_point
    if zero is None:
        return None
    if zero.dtype == jnp.float16:
        zero = zero.astype(jnp.float32)
    return jnp.broadcast_to(zero, (*zero.shape[:-1], w.stored_shape[-1]))
