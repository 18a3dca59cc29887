"""Quantized trees without a model: every kind of array that a checkpoint holds, and a plan."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxquant.intercept import LeafPlan, Plan, SitePlan, stamped
from jaxquant.numerics import (
    BFLOAT16,
    E3M2,
    E4M3,
    E5M2,
    FLOAT16,
    Format,
    INT3,
    INT4,
    INT8,
    MinMax,
    UINT4,
    UINT5,
)
from jaxquant.qarray import (
    abstract_qarray,
    is_qarray,
    PER_CHANNEL,
    PER_TENSOR,
    QArray,
    Scheme,
    schemes,
    Tile,
)

# Path -> shape of the weight, whose first axis is contracted, and how it is held.
WEIGHTS = {
    "int4/groups": ((24, 10), Scheme(values=INT4, tile=Tile(contracted=8), scale=BFLOAT16)),
    "int4/odd": ((9, 5), Scheme(values=INT4, tile=PER_CHANNEL, scale=FLOAT16)),
    "int4/zero": (
        (16, 6),
        Scheme(values=INT4, tile=Tile(contracted=4), range=MinMax(), zero_point=INT4),
    ),
    "int8/zero": (
        (16, 6),
        Scheme(values=INT8, tile=PER_CHANNEL, range=MinMax(), zero_point=INT8),
    ),
    "int8/channel": ((8, 12), Scheme(values=INT8, tile=PER_CHANNEL)),
    "int8/tensor": ((8, 12), Scheme(values=INT8, tile=PER_TENSOR)),
    "e4m3/channel": ((8, 12), Scheme(values=E4M3, tile=PER_CHANNEL)),
    "e5m2/block": ((8, 12), Scheme(values=E5M2, tile=Tile(contracted=4, kept=4))),
    "int3/ragged": ((10, 7), Scheme(values=INT3, tile=Tile(contracted=4, ragged=True))),
    "uint5/zero": (
        (16, 8),
        Scheme(values=UINT5, tile=Tile(contracted=4), range=MinMax(), zero_point=UINT5),
    ),
    "uint4/real": (
        (16, 8),
        Scheme(values=UINT4, tile=Tile(contracted=8), range=MinMax(), zero_point=BFLOAT16),
    ),
    "e3m2/groups": ((16, 8), Scheme(values=E3M2, tile=Tile(contracted=8))),
    "mxfp4/groups": ((64, 6), schemes.MXFP4),
    "nvfp4/groups": ((32, 6), schemes.NVFP4),
    "nf4/double": ((128, 40), schemes.NF4_DOUBLE),
    "binary/channel": ((8, 9), schemes.BINARY),
}


def weights() -> dict[str, QArray]:
    """The weights of the table, with arbitrary codes and scales."""
    return {path: some_qarray(shape, scheme) for path, (shape, scheme) in WEIGHTS.items()}


def some_qarray(shape: tuple[int, ...], scheme: Scheme) -> QArray:
    """A QArray with arbitrary codes and scales, made without compiling anything."""
    random = np.random.default_rng(0)
    shapes = abstract_qarray(shape, np.dtype(np.float32), scheme, contracted=(0,))

    def numbers(shape: tuple[int, ...], format: Format) -> jax.Array:
        if format.table is not None:
            codes = random.integers(0, len(format.table), shape)
        elif not format.integer and not format.native:
            codes = random.integers(0, 2**format.bits, shape)
        else:
            low, high = max(format.lowest, -127.0), min(format.highest, 127.0)
            codes = random.uniform(low - 0.9 if low < 0 else low, high, shape)
        return jnp.asarray(codes.astype(format.storage))

    def filled(q: QArray) -> QArray:
        if isinstance(q.scale, QArray):
            scale = filled(q.scale)
        else:
            scale = random.uniform(0.1, 1.0, q.scale.shape).astype(q.scheme.scale.storage)
        zero = None
        if q.scheme.zero_point is not None:
            zero = numbers(q.zero_point.shape, q.scheme.zero_point)
        offset = None if q.offset is None else jnp.full(q.offset.shape, 0.7)
        return dataclasses.replace(
            q,
            codes=numbers(q.codes.shape, q.scheme.values),
            scale=jax.tree.map(jnp.asarray, scale),
            zero_point=zero,
            offset=offset,
        )

    return filled(shapes)


def plan_of(qarrays: dict[str, QArray]) -> Plan:
    """A plan by which matrices are held as `qarrays`."""
    common = [
        {"path": path, "shape": tuple(q.shape), "dtype": str(q.dtype)}
        for path, q in qarrays.items()
    ]
    schemes = [q.scheme for q in qarrays.values()]
    return Plan(
        recipe="toy",
        sites=tuple(
            SitePlan(
                **row,
                site=f"{row['path']}#dot",
                op="dot",
                roles=("contracted", "kept"),
                weights=scheme,
                activations=None,
                rule="*",
                reason=None,
            )
            for row, scheme in zip(common, schemes, strict=True)
        ),
        leaves=tuple(
            LeafPlan(**row, scheme=q.scheme, contracted=(0,), stack=(), elsewhere="error")
            for row, q in zip(common, qarrays.values(), strict=True)
        ),
        others=(("norm/scale", "mul"),),
        sizes=(("norm/scale", 48),),
    )


def linen_tree() -> tuple[dict, Plan]:
    """Nested dictionaries: weights, plain arrays of several dtypes, a list, nothing, a key."""
    qarrays = weights()
    params: dict = {"norm": {"scale": jnp.linspace(0.0, 1.0, 12)}, "empty": {}}
    for path, q in qarrays.items():
        folder, name = path.split("/")
        params.setdefault(folder, {})[name] = q
    tree = {
        "params": params,
        "cache": {
            "half": jnp.arange(7, dtype=jnp.bfloat16),
            "four": jnp.arange(-8, 7, dtype=jnp.int4),
            "flags": jnp.array([True, False, True]),
            "steps": jnp.zeros((), jnp.uint32),
            "none": jnp.zeros((0, 3), jnp.float16),
        },
        "intermediates": {"sown": (jnp.ones(3), [jnp.arange(2), None])},
        "rngs": {
            "key": jax.random.key(7),
            "other": jax.random.split(jax.random.key(1, impl="rbg"), 2),
        },
    }
    plan = plan_of(qarrays)
    return stamped(tree, plan.fingerprint), plan


def nnx_tree() -> tuple[nnx.State, Plan]:
    """A State with weights, several types of Variable, metadata and integers as keys."""
    qarrays = {f"layers/{i}/kernel": q for i, q in enumerate(weights().values())}
    state = nnx.State(
        {
            "layers": {
                i: {"kernel": nnx.Param(q, note=("a", None, 3))}
                for i, q in enumerate(qarrays.values())
            },
            "norm": {"scale": nnx.Param(jnp.linspace(0.0, 1.0, 12))},
            "mean": nnx.BatchStat(jnp.zeros(4)),
            "cache": nnx.Cache(jnp.ones((2, 3), jnp.bfloat16)),
            "rngs": nnx.state(nnx.Rngs(dropout=3)),
        }
    )
    plan = plan_of(qarrays)
    return stamped(state, plan.fingerprint), plan


def bits(array) -> bytes:
    """The bytes of an array or key, wherever it lies."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array).tobytes()


def assert_same(a, b) -> None:
    """Equal structures, static data included, and equal bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert bits(x) == bits(y)


def qarrays_of(tree) -> list[QArray]:
    """The QArrays in a tree."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_qarray) if is_qarray(x)]
