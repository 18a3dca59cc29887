"""Real products as data: which shapes, rows and formats kernels are compiled and tested for."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...numerics import (
    BFLOAT16,
    E2M1,
    E4M3,
    INT2,
    INT3,
    INT4,
    INT8,
    MinMax,
    NF4,
    UINT2,
    UINT3,
    UINT4,
)
from ...qarray import PER_CHANNEL, Scheme, schemes, Tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A weight of a model: `k` inputs, `n` outputs; `parts` is over how many devices it is cut."""

    model: str
    part: str
    k: int
    n: int
    parts: int = 1

    def __str__(self) -> str:
        return f"{self.k}x{self.n}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """How the two sides are held; `activations` of `None` stay as they are."""

    name: str
    weights: Scheme
    activations: Scheme | None = None

    def of(self, k: int) -> "Held":
        """The same for `k` inputs: where tiles do not fill them, the last is shorter."""
        activations = None if self.activations is None else _filling(self.activations, k)
        weights = _filling(self.weights, k)
        return dataclasses.replace(self, weights=weights, activations=activations)


def _filling(scheme: Scheme, k: int) -> Scheme:
    tile = scheme.tile
    if tile.contracted is None or k % tile.contracted == 0:
        return scheme
    return dataclasses.replace(scheme, tile=dataclasses.replace(tile, ragged=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """`rows` of activations in `dtype` by a weight that is held in few bits."""

    linear: Linear
    rows: int
    held: Held
    dtype: np.dtype = jnp.dtype(jnp.bfloat16)

    @property
    def scheme(self) -> Scheme:
        """How the weight is held."""
        return self.held.of(self.linear.k).weights

    @property
    def activations(self) -> Scheme | None:
        """To what the activations are rounded, if they are."""
        return self.held.of(self.linear.k).activations


def _model(
    model: str, *, hidden: int, q: int, kv: int, inner: int, words: int, parts: int = 1
) -> tuple[Linear, ...]:
    """The linears of a decoder: column-parallel but for `o` and `down`, which are row-parallel."""
    shapes = (
        ("q", hidden, q // parts),
        ("k, v", hidden, kv // parts),
        ("o", q // parts, hidden),
        ("gate, up", hidden, inner // parts),
        ("down", inner // parts, hidden),
        ("head", hidden, words // parts),
    )
    return tuple(Linear(model=model, part=p, k=k, n=n, parts=parts) for p, k, n in shapes)


# Sizes are those of each model's `config.json` on the Hugging Face hub.
_8B: dict[str, Any] = dict(hidden=4096, q=4096, kv=1024, inner=14336, words=128256)
MODELS: dict[str, tuple[Linear, ...]] = {
    "Llama-3 8B": _model("Llama-3 8B", **_8B),
    "Llama-3 70B": _model("Llama-3 70B", hidden=8192, q=8192, kv=1024, inner=28672, words=128256),
    "Qwen3 8B": _model("Qwen3 8B", hidden=4096, q=4096, kv=1024, inner=12288, words=151936),
    "Qwen3 32B": _model("Qwen3 32B", hidden=5120, q=8192, kv=1024, inner=25600, words=151936),
    "SmolLM2 135M": _model("SmolLM2 135M", hidden=576, q=576, kv=192, inner=1536, words=49152),
    "Llama-3 8B over 8": _model("Llama-3 8B over 8", **_8B, parts=8),
}

DECODE = (1, 8, 16, 32, 64)
PREFILL = (512, 2048, 8192)


def _grouped(values: Any, group: int, zero: bool) -> Scheme:
    tile = Tile(contracted=group)
    if not zero:
        return Scheme(values=values, tile=tile, scale=BFLOAT16)
    return Scheme(values=values, tile=tile, scale=BFLOAT16, range=MinMax(), zero_point=values)


def _held() -> tuple[Held, ...]:
    found = [
        Held(name="int8", weights=schemes.INT8_CHANNEL),
        Held(name="e4m3", weights=Scheme(values=E4M3, tile=PER_CHANNEL)),
    ]
    for signed, unsigned in ((INT4, UINT4), (INT3, UINT3), (INT2, UINT2)):
        for group in (32, 64, 128):
            name = f"{signed.name.lower()} g{group}"
            found.append(Held(name=name, weights=_grouped(signed, group, zero=False)))
            found.append(Held(name=f"{name} zero", weights=_grouped(unsigned, group, zero=True)))
    by_token = Scheme(values=INT8, tile=PER_CHANNEL), Scheme(values=E4M3, tile=PER_CHANNEL)
    by_block = Scheme(values=E4M3, tile=Tile(contracted=128))
    return (
        *found,
        Held(name="nf4 g64", weights=_grouped(NF4, 64, zero=False)),
        Held(name="e2m1 g64", weights=_grouped(E2M1, 64, zero=False)),
        Held(name="mxfp4", weights=schemes.MXFP4),
        Held(name="w8a8 int8", weights=schemes.INT8_CHANNEL, activations=by_token[0]),
        Held(name="w8a8 e4m3", weights=found[1].weights, activations=by_token[1]),
        Held(
            name="w4a8 int4",
            weights=Scheme(values=INT4, tile=PER_CHANNEL),
            activations=by_token[0],
        ),
        Held(name="w8a8 e4m3 block", weights=schemes.E4M3_BLOCK, activations=by_block),
    )


HELD: dict[str, Held] = {held.name: held for held in _held()}
"""Every way to hold the two sides, by name."""

MAIN = ("int4 g128", "int4 g128 zero", "int8", "e4m3")
"""The formats that are compiled for every shape."""
_MAIN_ROWS = (16, 512)
_OTHER_ROWS = (1, 16, 64, 512)


def _shapes() -> tuple[Linear, ...]:
    """One linear of each shape."""
    found: dict[tuple[int, int], Linear] = {}
    for linears in MODELS.values():
        for linear in linears:
            found.setdefault((linear.k, linear.n), linear)
    return tuple(found.values())


SHAPES = _shapes()


def linear_of(k: int, n: int) -> Linear:
    """The linear of that shape.

    **Raises:** `ValueError` if no model has one.
    """
    for linear in SHAPES:
        if (linear.k, linear.n) == (k, n):
            return linear
    raise ValueError(f"No model of the cases has a linear of {k}x{n}; SHAPES lists those there.")


SQUARE, WIDE = linear_of(4096, 4096), linear_of(4096, 14336)
_LONG, _NARROW = linear_of(14336, 4096), linear_of(576, 1536)


def _cases() -> tuple[Case, ...]:
    """Main formats for every shape, all rows for two of them; other formats for four shapes."""
    wanted: dict[Case, None] = {}
    for name in MAIN:
        for linear in SHAPES:
            both = linear in (SQUARE, WIDE)
            for rows in (*DECODE, *PREFILL) if both else _MAIN_ROWS:
                wanted[Case(linear=linear, rows=rows, held=HELD[name])] = None
    for held in HELD.values():
        for linear in (SQUARE, WIDE, _LONG, _NARROW):
            for rows in _OTHER_ROWS if linear == SQUARE else (16,):
                wanted[Case(linear=linear, rows=rows, held=held)] = None
        if held.activations is None:
            for rows in (1, 64):
                case = Case(linear=SQUARE, rows=rows, held=held, dtype=jnp.dtype(jnp.float32))
                wanted[case] = None
    return tuple(wanted)


CASES = _cases()

_WIDEST_BLOCK, _LONGEST_BLOCK, _ROWS_BLOCK = 1024, 8192, 128
"""No block of a kernel for TPU is larger: see `_mosaic_tpu_blocks.py`."""


def cut_down(case: Case) -> Case:
    """A small case of the same kind, for what is run step by step.

    Left are: whole or ragged last groups and last columns (sizes are the same modulo 1024), several
    blocks of columns, of rows (the last of them shorter), and along `k` where `case` has these.
    """
    k, n, rows = case.linear.k, case.linear.n, case.rows
    long = k > _LONGEST_BLOCK
    if long:
        k, n = _LONGEST_BLOCK + 1024 + k % 1024, min(n, 1024)
    else:
        k = k if k <= 1024 else 1024 + k % 1024
        n = n if n <= _WIDEST_BLOCK else _WIDEST_BLOCK + (n % _WIDEST_BLOCK or _WIDEST_BLOCK)
    rows = rows if rows <= _ROWS_BLOCK else _ROWS_BLOCK + 8
    linear = dataclasses.replace(case.linear, k=k, n=n)
    return dataclasses.replace(case, linear=linear, rows=rows)
