"""jaxquant's side of the cases."""

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from array_cases import DRAWS
from calibration_cases import COLUMNS
from flax import nnx
from flax_models import bytes_of, make, nested, products_of

import jaxquant as jq
from jaxquant import algorithms, intercept, numerics, training
from jaxquant.qarray import is_qarray

Arrays = dict[str, Any]
INT8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)


def _split(inputs: Arrays) -> tuple[Arrays, list[Any]]:
    params = {k.removeprefix("params/"): v for k, v in inputs.items() if k.startswith("params/")}
    return params, [jnp.asarray(inputs[k]) for k in sorted(inputs) if k.startswith("x")]


def _model(number: int) -> Callable[[str, Arrays], Arrays]:
    def run(part: str, inputs: Arrays) -> Arrays:
        params, x = _split(inputs)
        model = make(number, part, params)
        recipe = jq.Recipe(name="int8", rules=(jq.Rule(match="*", weights=INT8),))
        if isinstance(model, nnx.Module):
            nnx.update(model, nested(params))
            variables = nnx.state(model)
        elif number in (13, 14):
            variables = model.init(jax.random.key(0), *x)
        else:
            variables = {"params": nested(params)}
        plan = jq.plan(model, variables, *x, recipe=recipe)
        qvariables = jq.quantize(variables, plan)
        if isinstance(model, nnx.Module):
            return {"y": jq.wrap(model, plan, qvariables)(*x), "bytes": bytes_of(qvariables)}
        y = jq.wrap(model, plan).apply(qvariables, *x)
        return {"y": y, "bytes": bytes_of(qvariables)}

    return run


def _bits(q: jq.QArray) -> float:
    """Bits a value, by the dtypes of what is held."""
    return 8 * bytes_of(q) / q.size


def _named(scheme: str) -> Callable[[str, Arrays], Arrays]:
    def run(part: str, inputs: Arrays) -> Arrays:
        made = getattr(jq.schemes, scheme or part.upper())
        q = jq.quantize_array(jnp.asarray(inputs["w"]), made, contracted=(0,))
        return {"values": jq.dequantize(q), "bits": _bits(q)}

    return run


def _stochastic(part: str, inputs: Arrays) -> Arrays:
    x = jnp.asarray(inputs["w"])
    scheme = jq.Scheme(values=getattr(jq.formats, part.upper()), tile=jq.PER_TENSOR)

    def draw(key: Any) -> Any:
        return jq.dequantize(jq.quantize_array(x, scheme, contracted=(0,), key=key))

    return {"mean": jax.vmap(draw)(jax.random.split(jax.random.key(17), DRAWS)).mean(axis=0)}


def _int2(part: str, inputs: Arrays) -> Arrays:
    scheme = jq.Scheme(values=jq.formats.INT2, tile=jq.PER_CHANNEL)
    q = jq.quantize_array(jnp.asarray(inputs["w"]), scheme, contracted=(0,))
    # In memory a code takes a byte: XLA's CPU backend aborts where native int2 arrays are joined.
    packed = numerics.pack(q.codes, jq.formats.INT2, q.codes.shape[-1])
    codes = numerics.unpack(packed, jq.formats.INT2, q.codes.shape[-1])
    q = dataclasses.replace(q, codes=codes)
    bits = 8 * (packed.nbytes + q.scale.nbytes) / q.size
    return {"values": jq.dequantize(q), "bits": bits}


def _asymmetric(part: str, inputs: Arrays) -> Arrays:
    values = getattr(jq.formats, part.upper())
    if values.integer:
        scheme = jq.Scheme(values=values, tile=jq.PER_TENSOR, range=jq.MinMax(), zero_point=values)
    else:
        scheme = jq.Scheme(values=values, tile=jq.PER_TENSOR, centered=True)
    q = jq.quantize_array(jnp.asarray(inputs["w"]), scheme, contracted=(0,))
    return {"values": jq.dequantize(q)}


def _loaded(part: str, inputs: Arrays) -> Arrays:
    """NF4 through a checkpoint into the kernel of a float model."""
    w = inputs["w"]
    model = make(21, part, {"kernel": w})
    variables = {"params": nested({"kernel": w})}
    scheme = jq.Scheme(values=jq.formats.NF4, tile=jq.PER_CHANNEL)
    recipe = jq.Recipe(name="nf4", rules=(jq.Rule(match="*", weights=scheme),))
    plan = jq.plan(model, variables, jnp.ones((1, w.shape[0])), recipe=recipe)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "nf4"
        jq.save(path, jq.quantize(variables, plan), plan)
        loaded, _ = jq.load(path)
    # The float model reads its kernel: a row of the unit matrix in, a row of the kernel out.
    kernel = jq.dequantize(loaded["params"]["kernel"])
    return {"values": model.apply({"params": {"kernel": kernel}}, jnp.eye(w.shape[0]))}


def _bfloat16(part: str, inputs: Arrays) -> Arrays:
    w = jnp.asarray(inputs["w"], jnp.bfloat16)
    model = make(22, part, {"kernel": w})
    variables = {"params": {"kernel": w}}
    recipe = jq.Recipe(name="int8", rules=(jq.Rule(match="*", weights=INT8),))
    plan = jq.plan(model, variables, jnp.ones((1, w.shape[0]), jnp.bfloat16), recipe=recipe)
    q = jq.quantize(variables, plan)["params"]["kernel"]
    values = np.asarray(q.codes, np.float64) * np.asarray(q.scale, np.float64)
    return {"values": values, "scale_dtype": str(q.scale.dtype)}


def _gptq_scheme(number: int, part: str) -> jq.Scheme:
    if number == 2:
        values = jq.formats.UINT4
        return jq.Scheme(values=values, tile=jq.PER_CHANNEL, range=jq.MinMax(), zero_point=values)
    held = {"int3": jq.formats.INT3, "nf4": jq.formats.NF4}.get(part, jq.formats.INT4)
    return jq.Scheme(values=held, tile=jq.PER_CHANNEL)


def _gptq(number: int) -> Callable[[str, Arrays], Arrays]:
    def run(part: str, inputs: Arrays) -> Arrays:
        params, x = _split(inputs)
        model = make(number, part, params)
        variables = {"params": nested(params)}
        rule = jq.Rule(match="*", weights=_gptq_scheme(number, part))
        plan = jq.plan(model, variables, *x, recipe=jq.Recipe(name="gptq", rules=(rule,)))
        seen = jq.observe(model, variables, [tuple(x)], observers=(intercept.Gram(),))
        (statistics,) = seen.values()
        (leaf,) = plan.leaves
        (w,) = params.values()
        roles = {"contracted": leaf.contracted, "stack": leaf.stack}
        matrix = algorithms.as_matrix(jnp.asarray(w), **roles)
        chosen = algorithms.GPTQ().run(matrix, statistics, leaf.scheme)
        parts = (chosen.codes, chosen.scale, chosen.zero_point)
        q = algorithms.assemble(*parts, shape=w.shape, dtype=w.dtype, scheme=leaf.scheme, **roles)
        # The tree that rounding to nearest gives, with other codes.
        tree = jq.quantize(variables, plan)
        tree = jax.tree.map(lambda held: q if is_qarray(held) else held, tree, is_leaf=is_qarray)
        return {"y": jq.wrap(model, plan).apply(tree, *x)}

    return run


def _gptq_compiling(part: str, inputs: Arrays) -> Arrays:
    scheme = jq.Scheme(values=jq.formats.INT4, tile=jq.PER_CHANNEL)
    seconds = {}
    for n in COLUMNS:
        arrays = jnp.asarray(inputs[f"w{n}"]), jnp.asarray(inputs[str(n)])
        start = time.perf_counter()
        algorithms.gptq.lower(*arrays, scheme, algorithms.GPTQ()).compile()
        seconds[f"seconds {n}"] = time.perf_counter() - start
    return seconds


def _smoothquant(part: str, inputs: Arrays) -> Arrays:
    """Nothing before the layer takes the factors: its inputs are divided at run time."""
    params, x = _split(inputs)
    model = make(6, part, params)
    variables = {"params": nested(params)}
    smooth = algorithms.SmoothQuant(unfolded=True)
    rule = jq.Rule(match="*", weights=INT8, activations=INT8, scaling=smooth)
    plan = jq.plan(model, variables, *x, recipe=jq.Recipe(name="smooth", rules=(rule,)))
    made = jq.calibrate(model, variables, [tuple(x)], plan)
    jaxpr = jax.make_jaxpr(jq.wrap(model, plan).apply)(made.qvariables, *x)
    return {"products": np.array(products_of(jaxpr.jaxpr))}


def _qat(part: str, inputs: Arrays) -> Arrays:
    """The forward of training: codes made in the call, the experts multiplied by `ragged_dot`."""
    params, x = _split(inputs)
    model = make(8, part, params)
    variables = {"params": nested(params)}
    learned = training.LSQ(start=training.Start.RANGE)
    rule = jq.Rule(match="*", weights=INT8, training=training.Training(weights=learned))
    plan = jq.plan(model, variables, *x, recipe=jq.Recipe(name="qat", rules=(rule,)))
    tvariables = jq.start_training(model, variables, plan)
    return {"y": jq.simulate(model, plan).apply(tvariables, *x)}


RUNS: dict[int, Callable[[str, Arrays], Arrays]] = {
    **{number: _model(number) for number in (1, 7, 9, 10, 11, 12, 13, 14)},
    **{number: _gptq(number) for number in (2, 3, 4)},
    5: _gptq_compiling,
    6: _smoothquant,
    8: _qat,
    15: _named("NVFP4"),
    16: _named(""),
    17: _stochastic,
    18: _int2,
    19: _named("BINARY"),
    20: _asymmetric,
    21: _loaded,
    22: _bfloat16,
}
