"""The tensors in which bitsandbytes keeps a 4-bit weight, to a QArray and back, byte for byte.

For a weight called `weight` its state dict, and the safetensors files of transformers, hold:

- `weight`: uint8 (n / 2, 1), two codes a byte, **the first in the high nibble**;
- `weight.absmax`: a float32 for each block; with double quantization its 8-bit code;
- `weight.quant_map`: float32 (16), the value of each code;
- `weight.nested_absmax`: with double quantization a float32 for each 256 blocks;
- `weight.nested_quant_map`: likewise float32 (256), the value of each 8-bit code;
- `weight.quant_state.bitsandbytes__nf4`: JSON as uint8, with block size, shape, dtype and offset.

Blocks, and blocks of blocks, run over the flattened array. All of this is NumPy: bytes must not
depend on how a compiler orders arithmetic.
"""

import json
import math
from collections.abc import Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from ..numerics import DYNAMIC8, FLOAT32, Format, FP4, NF4
from ..qarray import CANONICAL, QArray, Scheme, Tile
from ..qarray._qarray import scale_values, short_tiles, tile_counts
from ._errors import CheckpointError

KINDS: dict[str, Format] = {"nf4": NF4, "fp4": FP4}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
# Below this an absmax is taken for it, so that it can be divided by.
LEAST = np.float32(1e-38)


def write_bitsandbytes(
    q: QArray, *, name: str = "weight", double: bool = False
) -> dict[str, np.ndarray]:
    """The tensors that bitsandbytes would keep `q` in, under their keys.

    With `double`, scales that `q` holds in float32 are quantized as bitsandbytes does it. Scales
    that are codes of `DYNAMIC8` already are written as they are.

    **Raises:** `ValueError` if `q` is not NF4 or FP4, or its tiles are not runs of the flattened
    array.
    """
    kind = next((kind for kind, format in KINDS.items() if format == q.scheme.values), None)
    if kind is None:
        raise ValueError(
            f"bitsandbytes keeps NF4 and FP4; got codes of {q.scheme.values}. Quantize with "
            "schemes.NF4 or schemes.FP4."
        )
    block = math.prod(q.stored_tile)
    if q.layout != CANONICAL or not _runs(q.stored_tile, q.stored_shape):
        raise ValueError(
            f"Blocks of bitsandbytes are runs of the flattened array; got tiles of {q.stored_tile} "
            f"of an array of shape {q.shape} in {q.layout}. Relayout to CANONICAL, and put tiles "
            "that divide it along the last axis."
        )
    if block not in BLOCKS:
        raise ValueError(
            f"bitsandbytes has kernels for blocks of {', '.join(map(str, BLOCKS))}; got {block}. "
            "Use a tile of one of these sizes."
        )
    codes = np.asarray(q.codes).astype(np.uint8).ravel()
    held: dict[str, np.ndarray] = {"": pack_high_first(codes, KINDS[kind])[:, None]}
    state = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": q.dtype.name,
        "shape": list(q.shape),
    }
    if isinstance(q.scale, QArray):
        _check_nested(q.scale)
        nested = np.asarray(scale_values(q.scale)).ravel()
        parts = (np.asarray(q.scale.codes).ravel(), nested, np.asarray(q.scale.offset).item())
    elif double:
        parts = double_quantize(_absmax(q, codes, block))
    else:
        parts = None
        held[".absmax"] = _absmax(q, codes, block)
    held[".quant_map"] = np.asarray(KINDS[kind].table, np.float32)
    if parts is not None:
        held[".absmax"], held[".nested_absmax"], offset = parts
        held[".nested_quant_map"] = np.asarray(DYNAMIC8.table, np.float32)
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = float(offset)
    text = json.dumps(state).encode()
    held[f".quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
    return {name + key: tensor for key, tensor in held.items()}


def read_bitsandbytes(tensors: Mapping[str, np.ndarray], *, name: str = "weight") -> QArray:
    """The QArray that stands for the same values as what bitsandbytes kept.

    Doubly quantized scales stay codes where 256 of them fill rows of scales or divide one.
    Elsewhere those blocks are no boxes, and the scales are held in float32: the same values, with
    blocks of 64 in 0.37 bits more a value.

    **Raises:** `CheckpointError` if a tensor is missing or odd, or blocks straddle rows.
    """
    kind, state = _state(tensors, name)
    values, block, shape = KINDS[kind], state["blocksize"], tuple(state["shape"])
    size = math.prod(shape)
    if shape[-1] % block and size != shape[-1]:
        raise CheckpointError(
            f"{name}: blocks of {block} straddle rows of {shape[-1]}, which no tile can hold. "
            "Dequantize it with bitsandbytes and quantize the result."
        )
    for key, wanted in ((".quant_map", values), (".nested_quant_map", DYNAMIC8)):
        if name + key in tensors and not np.array_equal(
            tensors[name + key], np.asarray(wanted.table, np.float32)
        ):
            raise CheckpointError(
                f"{name}{key} is not the table of {wanted}; nothing else is known."
            )
    packed = np.asarray(tensors[name]).view(np.uint8).ravel()
    absmax = np.asarray(tensors[name + ".absmax"])
    counts = (*shape[:-1], -(-shape[-1] // block))
    if packed.size != -(-size // 2) or absmax.size != math.prod(counts):
        raise CheckpointError(
            f"{name}: {packed.size} bytes and {absmax.size} scales do not hold an array of shape "
            f"{shape} in blocks of {block}; wanted {-(-size // 2)} and {math.prod(counts)}."
        )
    scale, scheme = _scales(tensors, name, absmax.reshape(counts), state)
    tile = Tile(contracted=block, ragged=bool(shape[-1] % block))
    return QArray(
        codes=jnp.asarray(unpack_high_first(packed, size).reshape(shape).astype(values.storage)),
        scale=scale,
        zero_point=None,
        scheme=Scheme(
            values=values, tile=tile, scale=scheme, codes_first=isinstance(scheme, Scheme)
        ),
        layout=CANONICAL,
        dtype=np.dtype(getattr(ml_dtypes, state["dtype"], state["dtype"])),
        ragged=((-1, block),) if tile.ragged else (),
    )


def pack_high_first(codes: UInt8[np.ndarray, " n"], format: Format) -> UInt8[np.ndarray, " half"]:
    """Two 4-bit codes a byte, the first in the high nibble; an odd count is filled up with 0."""
    assert format.table is not None
    if len(codes) % 2:
        codes = np.append(codes, np.uint8(format.table.index(0.0)))
    return (codes[::2] << np.uint8(4)) | codes[1::2]


def unpack_high_first(packed: UInt8[np.ndarray, " half"], size: int) -> UInt8[np.ndarray, " n"]:
    """Undoes `pack_high_first`: the first `size` codes."""
    return np.stack([packed >> np.uint8(4), packed & np.uint8(15)], axis=-1).ravel()[:size]


def double_quantize(
    absmax: Float[np.ndarray, " blocks"],
) -> tuple[UInt8[np.ndarray, " blocks"], Float[np.ndarray, " nested"], np.float32]:
    """Codes of `absmax` less its mean, the float32 scale of each 256 of them, and the mean.

    `absmax = DYNAMIC8[code] * nested + mean`. The nearest value is taken, of two equally near the
    lower: as bitsandbytes does on a GPU. Its CPU kernel, from 0.50 on, goes by the nearest of 65536
    points instead, and gives about one code in 500 to the neighbour.
    """
    mean = np.float32(absmax.astype(np.float64).mean())
    centred = absmax - mean
    starts = np.arange(0, len(absmax), NESTED_BLOCK)
    nested = np.maximum.reduceat(np.abs(centred), starts)
    over = np.repeat(np.float32(1) / np.maximum(nested, LEAST), NESTED_BLOCK)[: len(absmax)]
    values = np.asarray(DYNAMIC8.table, np.float32)
    middles = (values[:-1] + values[1:]) / np.float32(2)
    codes = np.searchsorted(middles, np.clip(centred * over, -1, 1), side="left")
    return codes.astype(np.uint8), nested, mean


def _absmax(q: QArray, codes: UInt8[np.ndarray, " n"], block: int) -> Float[np.ndarray, " blocks"]:
    """Scales as bitsandbytes writes them: 0 where a block is all zeros."""
    table = np.asarray(q.scheme.values.table, np.float32)
    some = np.logical_or.reduceat(table[codes] != 0, np.arange(0, len(codes), block))
    return np.where(some, np.asarray(scale_values(q)).ravel(), np.float32(0))


def _runs(tile: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether tiles are runs of the flattened array, of the same length but for the last one."""
    if all(t == 1 for t in tile[:-1]):
        return shape[-1] % tile[-1] == 0 or math.prod(shape) == shape[-1]
    return tile[-1] == shape[-1] and _runs(tile[:-1], shape[:-1])


def _check_nested(scale: QArray) -> None:
    run = math.prod(scale.stored_tile)
    fits = _runs(scale.stored_tile, scale.stored_shape) and (
        run == NESTED_BLOCK or run == scale.size < NESTED_BLOCK
    )
    if scale.scheme.values != DYNAMIC8 or not scale.scheme.centered or not fits:
        raise ValueError(
            f"bitsandbytes holds scales as centered codes of DYNAMIC8, 256 in a run; got "
            f"{scale.scheme} in tiles of {scale.stored_tile}. Quantize with schemes.NF4 and write "
            "with double=True."
        )


def _state(tensors: Mapping[str, np.ndarray], name: str) -> tuple[str, dict]:
    """The kind and the JSON of a weight."""
    for kind in KINDS:
        key = f"{name}.quant_state.bitsandbytes__{kind}"
        if key in tensors:
            break
    else:
        raise CheckpointError(
            f"{name} has no quant_state of {' or '.join(KINDS)}: it is not a 4-bit weight of "
            "bitsandbytes."
        )
    try:
        state = json.loads(np.asarray(tensors[key]).astype(np.uint8).tobytes())
    except ValueError as error:
        raise CheckpointError(f"{key} is not JSON: {error}.") from None
    wanted = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
    if "nested_offset" in state:
        wanted |= {"nested_blocksize": int, "nested_offset": float}
    for field, type_ in wanted.items():
        if not isinstance(state.get(field), type_):
            raise CheckpointError(
                f"{key}: {field} is {state.get(field)!r}, not a {type_.__name__}."
            )
    needed = [name, name + ".absmax"]
    needed += [name + ".nested_absmax"] if "nested_offset" in state else []
    if missing := [each for each in needed if each not in tensors]:
        raise CheckpointError(f"{name} is kept without {', '.join(missing)}.")
    return kind, state


def _scales(
    tensors: Mapping[str, np.ndarray], name: str, absmax: np.ndarray, state: dict
) -> tuple[QArray | jnp.ndarray, Scheme | Format]:
    if "nested_offset" not in state:
        return jnp.asarray(absmax.astype(np.float32)), FLOAT32
    nested, run = np.asarray(tensors[name + ".nested_absmax"]), state["nested_blocksize"]
    offset = np.float32(state["nested_offset"])
    if nested.size != -(-absmax.size // run):
        raise CheckpointError(
            f"{name}.nested_absmax holds {nested.size} scales for {absmax.size} blocks, in runs of "
            f"{run}; wanted {-(-absmax.size // run)}."
        )
    columns = absmax.shape[-1]
    rows = absmax.size // columns
    if absmax.ndim != 2 or (run % columns and columns % run and rows > 1):
        every = np.repeat(nested, run)[: absmax.size].reshape(absmax.shape)
        values = np.asarray(DYNAMIC8.table, np.float32)[absmax]
        return jnp.asarray(values * every + offset), FLOAT32
    along, across = min(run, columns), max(1, min(run // columns, rows))
    tile = Tile(
        contracted=None if along == columns else along,
        kept=across,
        ragged=bool(columns % along or rows % across),
    )
    scheme = Scheme(values=DYNAMIC8, tile=tile, centered=True)
    counts = tile_counts((rows, columns), (across, along))
    held = QArray(
        codes=jnp.asarray(absmax.astype(np.uint8)),
        scale=jnp.asarray(nested.astype(np.float32).reshape(counts)),
        zero_point=None,
        offset=jnp.full((1, 1), offset),
        scheme=scheme,
        layout=CANONICAL,
        dtype=np.dtype(np.float32),
        ragged=short_tiles((rows, columns), (across, along)),
    )
    return held, scheme
