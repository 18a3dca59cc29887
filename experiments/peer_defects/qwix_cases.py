"""qwix's side of the cases, by its documented interface as far as that goes.

What is not public is said so where it is imported.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from array_cases import DRAWS
from calibration_cases import COLUMNS
from flax import nnx
from flax_models import bytes_of, make, nested, products_of

# `HowToQuantize` is the only way to a noise function for stochastic rounding.
from qwix._src.core import qarray
from qwix.contrib import gptq, gptq_core, smooth_quant

Arrays = dict[str, Any]
KEY = 0
INT8 = {"weight_qtype": jnp.int8}


def _split(inputs: Arrays) -> tuple[Arrays, list[Any]]:
    params = {k.removeprefix("params/"): v for k, v in inputs.items() if k.startswith("params/")}
    return params, [jnp.asarray(inputs[k]) for k in sorted(inputs) if k.startswith("x")]


def _template(model: Any, provider: Any, x: list[Any]) -> tuple[Any, Any]:
    """The quantized Linen model, and the shapes of its parameters."""
    quantized = qwix.quantize_model(model, provider)
    return quantized, jax.eval_shape(quantized.init, jax.random.key(KEY), *x)["params"]


def _offline(number: int) -> Callable[[str, Arrays], Arrays]:
    """`quantize_params` of the float weights, as the README of qwix shows it."""

    def run(part: str, inputs: Arrays) -> Arrays:
        params, x = _split(inputs)
        model = make(number, part, params)
        provider = qwix.PtqProvider([qwix.QuantizationRule(**INT8)])
        if isinstance(model, nnx.Module):
            template = nnx.eval_shape(lambda: qwix.quantize_model(model, provider, *x))
            held = qwix.quantize_params(nested(params), template)
            nnx.update(template, held)
            return {"y": template(*x), "bytes": bytes_of(held)}
        quantized, template = _template(model, provider, x)
        held = qwix.quantize_params(nested(params), template)
        return {"y": quantized.apply({"params": held}, *x), "bytes": bytes_of(held)}

    return run


def _online(number: int) -> Callable[[str, Arrays], Arrays]:
    """`init` of the quantized model, not compiled, which quantizes the weights that it makes."""

    def run(part: str, inputs: Arrays) -> Arrays:
        if part == "offline":
            return _offline(number)(part, inputs)
        params, x = _split(inputs)
        provider = qwix.PtqProvider([qwix.QuantizationRule(**INT8)])
        quantized = qwix.quantize_model(make(number, part, params), provider)
        variables = quantized.init(jax.random.key(KEY), *x)
        return {"y": quantized.apply(variables, *x), "bytes": bytes_of(variables)}

    return run


def _gptq(number: int) -> Callable[[str, Arrays], Arrays]:
    def run(part: str, inputs: Arrays) -> Arrays:
        params, x = _split(inputs)
        model = make(number, part, params)
        qtype = {"int3": "int3", "nf4": "nf4"}.get(part, jnp.int4)
        method = "minmax" if number == 2 else "absmax"
        settings = {"weight_qtype": qtype, "weight_calibration_method": method}
        watched = qwix.quantize_model(
            model, gptq.GptqCalibrationProvider([gptq.GptqRule(**settings)])
        )
        _, seen = watched.apply({"params": nested(params)}, *x, mutable="quant_stats")
        provider = qwix.PtqProvider([qwix.QuantizationRule(**settings)])
        quantized, template = _template(model, provider, x)
        stats = seen.get("quant_stats", {})
        held = gptq.quantize_params(nested(params), template, stats)
        return {"y": quantized.apply({"params": held}, *x)}

    return run


def _gptq_compiling(part: str, inputs: Arrays) -> Arrays:
    how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,))
    seconds = {}
    for n in COLUMNS:
        jitted = jax.jit(lambda w, h: gptq_core.quantize_weight(w, h, how)[0])
        start = time.perf_counter()
        jitted.lower(jnp.asarray(inputs[f"w{n}"]), jnp.asarray(inputs[str(n)])).compile()
        seconds[f"seconds {n}"] = time.perf_counter() - start
    return seconds


def _smoothquant(part: str, inputs: Arrays) -> Arrays:
    params, x = _split(inputs)
    model = make(6, part, params)
    rule = smooth_quant.SqRule(weight_qtype=jnp.int8, act_qtype=jnp.int8)
    watched = qwix.quantize_model(model, smooth_quant.SqCalibrationProvider([rule]))
    _, seen = watched.apply({"params": nested(params)}, *x, mutable="quant_stats")
    rule = qwix.QuantizationRule(weight_qtype=jnp.int8, act_qtype=jnp.int8)
    _, template = _template(model, qwix.PtqProvider([rule]), x)
    held = smooth_quant.quantize_params(nested(params), template, seen["quant_stats"])
    quantized = qwix.quantize_model(model, smooth_quant.SqInferenceProvider([rule]))
    jaxpr = jax.make_jaxpr(quantized.apply)({"params": held}, *x)
    return {"products": np.array(products_of(jaxpr.jaxpr))}


def _qat(part: str, inputs: Arrays) -> Arrays:
    params, x = _split(inputs)
    provider = qwix.QtProvider([qwix.QtRule(**INT8)])
    quantized = qwix.quantize_model(make(8, part, params), provider)
    return {"y": quantized.apply({"params": nested(params)}, *x)}


def _bits(q: Any) -> float:
    """Bits a value, by the dtypes of what is held."""
    return 8 * bytes_of(q) / q.qvalue.size


def _array(name: str, **settings: Any) -> Callable[[str, Arrays], Arrays]:
    """`qwix.quantize` of an array whose axis 0 is contracted."""

    def run(part: str, inputs: Arrays) -> Arrays:
        qtype = name or part
        tiles = {"mxfp4": {0: 32}, "nvfp4": {0: 16}}.get(qtype)
        q = qwix.quantize(
            jnp.asarray(inputs["w"]), qtype, channelwise_axes=(1,), tiled_axes=tiles, **settings
        )
        return {"values": qwix.dequantize(q), "bits": _bits(q)}

    return run


def _stochastic(part: str, inputs: Arrays) -> Arrays:
    x = jnp.asarray(inputs["w"])
    qtype = {"e4m3": jnp.float8_e4m3fn, "int4": jnp.int4, "int8": jnp.int8}.get(part, part)

    def draw(key: Any) -> Any:
        how = qarray.HowToQuantize(
            qtype=qtype, noise_fn=lambda shape: jax.random.uniform(key, shape) - 0.5
        )
        return qwix.dequantize(qarray.quantize(x, how))

    return {"mean": jax.vmap(draw)(jax.random.split(jax.random.key(17), DRAWS)).mean(axis=0)}


def _asymmetric(part: str, inputs: Arrays) -> Arrays:
    qtype = {"e4m3": jnp.float8_e4m3fn, "int4": jnp.int4}.get(part, part)
    q = qwix.quantize(jnp.asarray(inputs["w"]), qtype, calibration_method="minmax")
    return {"values": qwix.dequantize(q)}


def _loaded(part: str, inputs: Arrays) -> Arrays:
    """NF4 codes and scales, loaded into the kernel of a float model."""
    w = jnp.asarray(inputs["w"])
    q = qwix.quantize(w, "nf4", channelwise_axes=(1,))
    model = nnx.Linear(*w.shape, use_bias=False, rngs=nnx.Rngs(0))
    held = {"kernel": {"qvalue": q.qvalue, "scale": q.scale}}
    nnx.update(model, qwix.process_prequantized_params(held, model))
    return {"values": model(jnp.eye(w.shape[0]))}


def _bfloat16(part: str, inputs: Arrays) -> Arrays:
    w = jnp.asarray(inputs["w"], jnp.bfloat16)
    model = make(22, part, {"kernel": w})
    provider = qwix.PtqProvider([qwix.QuantizationRule(**INT8)])
    _, template = _template(model, provider, [jnp.ones((1, w.shape[0]), jnp.bfloat16)])
    q = qwix.quantize_params({"kernel": w}, template)["kernel"].array
    values = np.asarray(q.qvalue, np.float64) * np.asarray(q.scale, np.float64)
    return {"values": values, "scale_dtype": str(q.scale.dtype)}


RUNS: dict[int, Callable[[str, Arrays], Arrays]] = {
    **{number: _offline(number) for number in (1, 7, 9, 10, 11, 12)},
    **{number: _online(number) for number in (13, 14)},
    **{number: _gptq(number) for number in (2, 3, 4)},
    5: _gptq_compiling,
    6: _smoothquant,
    8: _qat,
    15: _array("nvfp4"),
    # The narrowest scales that its `dequantize` takes; they hold these exactly.
    16: _array("", scale_dtype=jnp.bfloat16),
    17: _stochastic,
    18: _array("int2"),
    19: _array("int1"),
    20: _asymmetric,
    21: _loaded,
    22: _bfloat16,
}
