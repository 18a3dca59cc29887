"""A decoder of the Llama family on a slice that is not here: laid out, compiled, accounted for."""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..intercept import map_leaves, Plan, plan as make_plan, prepare, Recipe, stamped, wrap
from ..intercept._placed import placed
from ..intercept._states import abstract_states
from ..models import Llama, LlamaConfig, Outline
from ..qarray import is_qarray, QArray, shardings_like
from ._compile import compile_for, Compiled
from ._hlo import Collective
from ._placement import Placement, tensor_parallel
from ._provenance import carriers_of_weights
from ._roofline import DecoderStep, Roofline, roofline
from ._targets import Target
from ._topology import mesh_for

DTYPE = jnp.bfloat16
"""What models compute in, and what a cache is held in."""

_LARGEST = 3
_KINDS = ("codes", "scales", "zero points", "other state", "norms and biases", "head", "embedding")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LaidOut:
    """Shapes of a model on a mesh of devices that are not here.

    `variables` are shapes with shardings, stored as the backends of the target read them; `held`
    are the bytes of them that a device holds, by kind.
    """

    outline: Outline
    target: Target
    mesh: Mesh
    placement: Placement
    plan: Plan | None
    graph: Any
    variables: Any
    held: Mapping[str, int]

    @property
    def config(self) -> LlamaConfig:
        return self.outline.config

    @property
    def devices(self) -> int:
        return self.mesh.devices.size

    @property
    def parameters(self) -> int:
        """Values of all parameters."""
        model = Llama.abstract(self.config)
        return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CompiledStep:
    """What the compiler made of one step; figures are those of one device.

    `held` are the bytes that shapes and shardings give, by kind. `compiled` is `None` where the
    step does not fit, and `refused` says why. `moving_weights` are the exchanges that carry
    weights, of which tensor parallelism has none.
    """

    step: DecoderStep
    held: Mapping[str, int]
    roofline: Roofline
    compiled: Compiled | None
    refused: str | None
    moving_weights: tuple[Collective, ...]
    seconds: float

    @property
    def fits(self) -> bool:
        return self.compiled is not None and self.compiled.fits

    @property
    def parts(self) -> dict[str, int]:
        """`held`, with what the compiler adds, by name."""
        if self.compiled is None:
            return dict(self.held)
        memory = self.compiled.memory
        return {**self.held, "temporaries": memory.temporaries, "program": memory.code}

    @property
    def unaccounted(self) -> int | None:
        """Bytes that the compiler wants beside `parts`: arrays padded to whole tiles."""
        if self.compiled is None:
            return None
        return self.compiled.memory.total - sum(self.parts.values())

    @property
    def largest(self) -> tuple[tuple[str, int], ...]:
        """The largest arrays that the step writes to the main memory, and which operation does."""
        written: dict[str, int] = {}
        for step in self.compiled.hlo.steps if self.compiled else ():
            name = step.op_name or step.name
            written[name] = max(written.get(name, 0), step.written)
        ordered = sorted(written.items(), key=lambda item: -item[1])
        return tuple(item for item in ordered[:_LARGEST] if item[1])


def lay_out(
    outline: Outline,
    recipe: Recipe | None,
    target: Target,
    shape: tuple[int, ...],
    *,
    batch: int,
    length: int,
) -> LaidOut:
    """A model by `recipe` on a slice: in bfloat16, tensor-parallel, planned for its devices.

    A quantized outline has its plan, and takes no recipe; a float one without is left as it is.
    `batch` and `length` are those of the cache that it decodes with.

    **Raises:** `ValueError` for a recipe on a quantized outline; `PlanError` if the recipe does not
    fit the model; `ImportError` without the target's compiler.
    """
    if outline.plan is not None and recipe is not None:
        raise ValueError(
            f"This model is quantized already, by the recipe {outline.plan.recipe!r}. Leave out "
            "the recipe, or name the model that it was made from."
        )
    config, devices = outline.config, target.devices(shape)
    placement = tensor_parallel(config, devices, batch=batch, length=length)
    mesh = mesh_for(target, shape, placement.axes)
    model = Llama.abstract(config, dtype=DTYPE, param_dtype=outline.param_dtype)

    def on_mesh(path: str | None) -> NamedSharding:
        spec = PartitionSpec() if path is None else placement.spec(path)
        return NamedSharding(mesh, spec)

    variables = map_leaves(lambda path, x: _with(x, on_mesh(path)), nnx.state(model))
    with jax.set_mesh(mesh):
        made = _plan(model, variables, outline.plan, recipe)
        if made is None:
            graph, variables = nnx.graphdef(model), variables
        else:
            graph, variables = _quantized(model, variables, made, on_mesh)
    return LaidOut(
        outline=outline,
        target=target,
        mesh=mesh,
        placement=placement,
        plan=made,
        graph=graph,
        variables=variables,
        held=_held(variables),
    )


def _plan(model: Llama, variables: Any, known: Plan | None, recipe: Recipe | None) -> Plan | None:
    if recipe is not None:
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        return make_plan(model, variables, tokens, recipe=recipe)
    if known is None:
        return None
    shardings: dict[str, NamedSharding] = {}
    map_leaves(lambda path, x: shardings.update({str(path): x.sharding}) or x, variables)
    return placed(known, shardings)


def _quantized(model: Llama, variables: Any, plan: Plan, on_mesh: Any) -> tuple[Any, Any]:
    """The wrapped model and its variables, prepared for the devices in force."""
    held = map_leaves(
        lambda path, x: plan.by_path[path].abstract if path in plan.by_path else x, variables
    )
    held = stamped(held, plan.fingerprint, abstract_states(plan))
    prepared = jax.eval_shape(lambda v: prepare(v, plan), held)

    def laid(path: str | None, x: Any) -> Any:
        if not isinstance(x, QArray):
            return _with(x, on_mesh(path if path in known else None))
        return jax.tree.map(_with, x, shardings_like(x, on_mesh(path)))

    known = set(dict(plan.sizes))
    prepared = map_leaves(laid, prepared)
    return nnx.split(wrap(model, plan, prepared))


def _with(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def compile_step(laid: LaidOut, step: DecoderStep, *, schedule: bool = True) -> CompiledStep:
    """Compiles a step: without tokens seen a prefill, else decoding against a cache of these.

    Decoding takes the cache's memory for the new one. What is `held` alone may not fit: then
    nothing is compiled.

    **Raises:** what the compiler raises for other reasons than memory; `RuntimeError` if JAX does
    not run on the CPU.
    """
    start, mesh = time.perf_counter(), laid.mesh
    fresh = step.seen == 0
    tokens = _with(
        jax.ShapeDtypeStruct((step.rows, step.new), jnp.int32), NamedSharding(mesh, PartitionSpec())
    )
    cache = _cache(laid, step)
    logits = NamedSharding(mesh, laid.placement.logits)
    shardings = (logits, jax.tree.map(lambda x: x.sharding, cache))

    def prefill(weights: Any, tokens: Any) -> Any:
        return nnx.merge(laid.graph, weights).prefill(tokens, step.new)

    def decode(weights: Any, tokens: Any, cache: Any) -> Any:
        return nnx.merge(laid.graph, weights).decode(tokens, cache, last_only=True)

    if fresh:
        jitted = jax.jit(prefill, out_shardings=shardings)
    else:
        jitted = jax.jit(decode, out_shardings=shardings, donate_argnums=(2,))
    arguments = (laid.variables, tokens) if fresh else (laid.variables, tokens, cache)
    vocab = jax.ShapeDtypeStruct((step.rows, 1, laid.config.vocab_size), jnp.float32)
    held = {
        **laid.held,
        "cache": _bytes(cache.keys) + _bytes(cache.values),
        "tokens and position": _bytes(tokens) + _bytes(cache.position),
        "logits": _bytes(_with(vocab, logits)),
    }
    compiled, refused = None, None
    if (needed := sum(held.values())) > laid.target.hbm_bytes:
        refused = f"arrays alone take {needed} bytes of a device's {laid.target.hbm_bytes}"
    else:
        try:
            compiled = compile_for(jitted, arguments, laid.target, mesh=mesh, schedule=schedule)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused = str(error).strip().splitlines()[0]
    moving = frozenset() if compiled is None else carriers_of_weights(compiled.text, _is_weight)
    return CompiledStep(
        step=step,
        held=held,
        roofline=roofline(
            laid.target,
            laid.config,
            laid.plan,
            step,
            devices=laid.devices,
            bytes=_least_bytes(laid, step, held),
        ),
        compiled=compiled,
        refused=refused,
        moving_weights=tuple(
            each for each in (compiled.hlo.collectives if compiled else ()) if each.name in moving
        ),
        seconds=time.perf_counter() - start,
    )


def _cache(laid: LaidOut, step: DecoderStep) -> Any:
    model = Llama.abstract(laid.config, dtype=DTYPE, param_dtype=DTYPE)
    length = step.seen or step.new
    placement = tensor_parallel(laid.config, laid.devices, batch=step.rows, length=length)
    shapes = jax.eval_shape(lambda: model.init_cache(step.rows, length))

    def laid_out(x: Any) -> jax.ShapeDtypeStruct:
        return _with(x, NamedSharding(laid.mesh, placement.cache if x.shape else PartitionSpec()))

    return jax.tree.map(laid_out, shapes)


def _is_weight(name: str) -> bool:
    return name.startswith("weights")


def _bytes(shapes: Any) -> int:
    """Bytes of one device's shards, codes packed as XLA packs them on a chip."""
    return sum(
        -(-math.prod(x.sharding.shard_shape(x.shape)) * jax.dtypes.itemsize_bits(x.dtype) // 8)
        for x in jax.tree.leaves(shapes)
    )


def _held(variables: Any) -> dict[str, int]:
    """Bytes of a device by kind; kinds that a model has not are left out."""
    held: dict[str, int] = dict.fromkeys(_KINDS, 0)

    def add(path: str | None, x: Any) -> Any:
        if is_qarray(x):
            held["codes"] += _bytes(x.codes)
            held["scales"] += _bytes(x.scale) + _bytes(x.offset)
            held["zero points"] += _bytes(x.zero_point)
        elif path is None or path.startswith("_states"):
            held["other state"] += _bytes(x)
        else:
            name = path.removeprefix("model/")
            ends = {"embed/embedding": "embedding", "head/kernel": "head"}
            plain = "matrices left as they are" if name.endswith("kernel") else "norms and biases"
            kind = ends.get(name, plain)
            held[kind] = held.get(kind, 0) + _bytes(x)
        return x

    map_leaves(add, variables)
    return {kind: count for kind, count in held.items() if count}


def _least_bytes(laid: LaidOut, step: DecoderStep, held: Mapping[str, int]) -> int:
    """What a step must read and write: weights, logits and tokens once, of the embedding its rows.

    Decoding reads the cache and writes its new rows; a prefill writes it.
    """
    config, least = laid.config, dict(held)
    if not config.tied and "embedding" in least:
        rows = step.rows * step.new
        item = jnp.dtype(laid.outline.param_dtype).itemsize
        least["embedding"] = min(least["embedding"], rows * config.width * item)
    if step.seen:
        least["cache"] += held["cache"] * step.new // step.seen
    return sum(least.values())
