"""Cases 2 to 6 and 8: calibration and training."""

import dataclasses

import numpy as np
from model_cases import judge_output, ragged
from rounding import asymmetric, NF4, relative_error, to_integers, to_table
from verdict import Case, Outputs, Verdict

Arrays = dict[str, np.ndarray]
GAIN = 0.9
"""GPTQ on inputs as correlated as these gains more than twice as much."""
GPTQ_CRITERION = (
    "On the calibration inputs the output is off by at most 0.9 times what rounding to nearest on "
    "the same grid gives in float64."
)
COLUMNS = (32, 128)


def _correlated(rows: int, size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, size // 4)) @ rng.standard_normal((size // 4, size))
    return (mixed + 0.3 * rng.standard_normal((rows, size))).astype(np.float32)


def _weights(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _dense(part: str) -> Arrays:
    return {"x0": _correlated(256, 32, 2), "params/kernel": _weights(2, 32, 48)}


def _judge(inputs: Arrays, outputs: Outputs, equation: str, rounded: np.ndarray) -> Verdict:
    x = np.asarray(inputs["x0"], np.float64)
    (w,) = (np.asarray(v, np.float64) for k, v in inputs.items() if k.startswith("params/"))
    wanted = np.einsum(equation, x, w)
    limit = GAIN * relative_error(np.einsum(equation, x, rounded), wanted)
    error = relative_error(outputs["y"], wanted)
    return Verdict(
        ok=error <= limit,
        said=f"error {error:.3g}, to nearest {limit / GAIN:.3g}",
        measured={"error": error, "error_limit": limit},
    )


def _judge_2(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    return _judge(inputs, outputs, "bk,kn->bn", asymmetric(inputs["params/kernel"], 4, (0,)))


def _judge_3(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    w = inputs["params/kernel"]
    rounded = to_table(w, NF4, (0,)) if part == "nf4" else to_integers(w, int(part[3:]), (0,))
    return _judge(inputs, outputs, "bk,kn->bn", rounded)


def _inputs_4(part: str) -> Arrays:
    x = _correlated(256, 32, 4)
    if part == "two axes":
        return {"x0": x.reshape(256, 4, 8), "params/kernel": _weights(4, 4, 8, 48)}
    return {"x0": x.reshape(4, 64, 32), "params/w": _weights(4, 4, 32, 48)}


def _judge_4(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    if part == "two axes":
        rounded = to_integers(inputs["params/kernel"], 4, (0, 1))
        return _judge(inputs, outputs, "bij,ijn->bn", rounded)
    return _judge(inputs, outputs, "ebk,ekn->ebn", to_integers(inputs["params/w"], 4, (1,)))


def _inputs_5(part: str) -> Arrays:
    return {str(n): np.cov(_correlated(256, n, n).T).astype(np.float32) for n in COLUMNS} | {
        f"w{n}": _weights(n, 64, n) for n in COLUMNS
    }


def _judge_5(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    few, many = (float(outputs[f"seconds {n}"]) for n in COLUMNS)
    return Verdict(
        ok=many <= 2 * few,
        said=f"{few:.1f} s, {many:.1f} s",
        measured={"seconds": [few, many], "ratio": many / few, "ratio_limit": 2},
    )


def _judge_6(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    products = [str(p) for p in outputs["products"]]
    return Verdict(
        ok="int8 x int8" in products,
        said=", ".join(products),
        measured={"products": products},
    )


def _judge_8(part: str, inputs: Arrays, outputs: Outputs) -> Verdict:
    verdict = judge_output(ragged(), outputs, wanted_bytes=False)
    # Weights that were not rounded at all are no result either.
    rounded = verdict.measured["error"] >= verdict.measured["error_limit"] / 3
    return dataclasses.replace(verdict, ok=verdict.ok and rounded)


CALIBRATION_CASES = (
    Case(
        number=2,
        title="GPTQ with a zero point",
        criterion=GPTQ_CRITERION,
        parts=("int4",),
        inputs=_dense,
        judge=_judge_2,
    ),
    Case(
        number=3,
        title="GPTQ to int4, int3 and NF4",
        criterion=GPTQ_CRITERION,
        parts=("int4", "int3", "nf4"),
        inputs=_dense,
        judge=_judge_3,
    ),
    Case(
        number=4,
        title="GPTQ of two axes, and of experts",
        criterion=GPTQ_CRITERION,
        parts=("two axes", "experts"),
        inputs=_inputs_4,
        judge=_judge_4,
    ),
    Case(
        number=5,
        title="GPTQ compiles in bounded time",
        criterion="Compiling for 128 columns takes at most twice as long as for 32.",
        parts=("jit",),
        inputs=_inputs_5,
        judge=_judge_5,
    ),
    Case(
        number=6,
        title="SmoothQuant multiplies integers",
        criterion="With int8 weights and activations the model has a product of int8 by int8.",
        parts=("int8",),
        inputs=_dense,
        judge=_judge_6,
    ),
    Case(
        number=8,
        title="QAT of ragged_dot, weight-only",
        criterion=(
            "The output is off by at most 1.5 times what rounding the weights alone, per expert "
            "and output channel to int8, makes it in float64, and by at least half of that."
        ),
        parts=("ragged_dot",),
        inputs=lambda part: ragged().inputs(),
        judge=_judge_8,
    ),
)
