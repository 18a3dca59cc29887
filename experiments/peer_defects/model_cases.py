"""Cases 1, 7 and 9 to 14: models whose weights are rounded to int8, and what they should give."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from rounding import relative_error, to_integers
from verdict import Case, Outputs, Verdict

Arrays = dict[str, np.ndarray]
MARGIN = 1.5
"""Two ways to round alike differ in the last places of their scales, and so in single codes."""
CRITERION = (
    "The output is off by at most 1.5 times what rounding the weights alone, per output channel to "
    "int8, makes it in float64; the weights take a byte each, and 4 a channel."
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """Weights by path, the axes of each that are contracted, what goes in, and `forward` in NumPy.

    Axes named in `contracted` share a scale; all others are channels, layers or experts.
    """

    weights: Arrays
    contracted: dict[str, tuple[int, ...]]
    arguments: tuple[np.ndarray, ...]
    forward: Callable[..., np.ndarray]

    def inputs(self) -> Arrays:
        named = {f"params/{path}": w for path, w in self.weights.items()}
        return named | {f"x{i}": x for i, x in enumerate(self.arguments)}

    def output(self, change: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]) -> np.ndarray:
        """What the model gives in float64 once each weight is changed."""
        weights = {
            path: change(np.asarray(w, np.float64), self.contracted[path])
            for path, w in self.weights.items()
        }
        return self.forward(weights, *self.arguments)

    @property
    def allowed_bytes(self) -> int:
        total = 0
        for path, w in self.weights.items():
            shared = np.prod([w.shape[axis] for axis in self.contracted[path]])
            total += w.size + 4 * int(w.size / shared)
        return total


def exact(w: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return w


def int8(w: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return to_integers(w, 8, axes)


def judge_output(model: Model, outputs: Outputs, *, wanted_bytes: bool = True) -> Verdict:
    """The criterion of the model cases; QAT keeps its weights in float32, so bytes do not count."""
    wanted = model.output(exact)
    limit = MARGIN * relative_error(model.output(int8), wanted)
    error = relative_error(outputs["y"], wanted)
    measured = {"error": error, "error_limit": limit}
    said = f"error {error:.1g}"
    good = error <= limit
    if wanted_bytes:
        held = float(outputs["bytes"])
        measured |= {"bytes": held, "bytes_limit": model.allowed_bytes}
        if held > model.allowed_bytes:
            good, said = False, f"{said}, {held / model.allowed_bytes:.1f}x bytes"
    return Verdict(ok=good, said=said, measured=measured)


def _random(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def _scaled(w: np.ndarray, fan_in: int) -> np.ndarray:
    return (w / np.sqrt(fan_in)).astype(np.float32)


def _layered(path: str) -> Model:
    x, w = _random(1, (16, 64), (3, 64, 64))

    def forward(weights: Arrays, x: np.ndarray) -> np.ndarray:
        for layer in weights[path]:
            x = np.tanh(x @ layer)
        return x

    return Model(
        weights={path: _scaled(w, 64)}, contracted={path: (1,)}, arguments=(x,), forward=forward
    )


def _mapped() -> Model:
    x, w = _random(2, (3, 16, 64), (3, 64, 48))
    return Model(
        weights={"dense/kernel": _scaled(w, 64)},
        contracted={"dense/kernel": (1,)},
        arguments=(x,),
        forward=lambda weights, x: np.einsum("lbk,lkn->lbn", x, weights["dense/kernel"]),
    )


def ragged() -> Model:
    """Experts, one of them without rows."""
    x, w = _random(7, (32, 64), (4, 64, 48))
    sizes = np.array([5, 0, 17, 10], np.int32)

    def forward(weights: Arrays, x: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        expert = np.repeat(np.arange(len(sizes)), sizes)
        return np.einsum("bk,bkn->bn", x, weights["experts"][expert])

    return Model(
        weights={"experts": _scaled(w, 64)},
        contracted={"experts": (1,)},
        arguments=(x, sizes),
        forward=forward,
    )


def _convolution() -> Model:
    x, w = _random(9, (2, 8, 8, 16), (3, 3, 16, 32))

    def forward(weights: Arrays, x: np.ndarray) -> np.ndarray:
        wide = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [
            wide[:, i : i + 8, j : j + 8] @ weights["kernel"][i, j]
            for i in range(3)
            for j in range(3)
        ]
        return np.sum(taps, axis=0)

    return Model(
        weights={"kernel": _scaled(w, 144)},
        contracted={"kernel": (0, 1, 2)},
        arguments=(x,),
        forward=forward,
    )


def _einsum(equation: str, shapes: tuple[tuple[int, ...], ...]) -> Model:
    *arguments, w = _random(10, *shapes, (64, 48))
    return Model(
        weights={"w": _scaled(w, 64)},
        contracted={"w": (0,)},
        arguments=tuple(arguments),
        forward=lambda weights, *x: np.einsum(equation, *x, weights["w"]),
    )


def _tied() -> Model:
    (w,) = _random(11, (96, 64))
    tokens = np.random.default_rng(11).integers(0, 96, (16,)).astype(np.int32)
    path = "embed/embedding"
    return Model(
        weights={path: w},
        contracted={path: (1,)},
        arguments=(tokens,),
        forward=lambda weights, t: np.tanh(weights[path][t]) @ weights[path].T,
    )


def _scores() -> Model:
    x, w = _random(13, (64, 64), (64, 64))
    return Model(
        weights={"w": _scaled(w, 64)},
        contracted={"w": (0,)},
        arguments=(x,),
        forward=lambda weights, x: (x @ np.tanh(np.asarray(x, np.float64)).T) @ weights["w"],
    )


def _twins(view: str) -> Model:
    x, a, b = _random(14, (16, 64), (64, 64), (64, 64))
    transposed = view == "transposed"

    def forward(weights: Arrays, x: np.ndarray) -> np.ndarray:
        first, second = (weights[k].T if transposed else weights[k] for k in "ab")
        return np.tanh(x @ first) @ second

    return Model(
        weights={"a": _scaled(a, 64), "b": _scaled(b, 64)},
        contracted={"a": (1,) if transposed else (0,), "b": (1,) if transposed else (0,)},
        arguments=(x,),
        forward=forward,
    )


def _case(number: int, title: str, models: dict[str, Callable[[], Model]]) -> Case:
    def judge(part: str, inputs: Any, outputs: Outputs) -> Verdict:
        return judge_output(models[part](), outputs)

    return Case(
        number=number,
        title=title,
        criterion=CRITERION,
        parts=tuple(models),
        inputs=lambda part: models[part]().inputs(),
        judge=judge,
    )


MODEL_CASES = (
    _case(
        1,
        "Scanned layers, quantized offline",
        {
            "nn.scan": functools.partial(_layered, "layers/dense/kernel"),
            "nn.vmap": _mapped,
            "nnx.scan": functools.partial(_layered, "layers/kernel"),
        },
    ),
    _case(7, "Experts by ragged_dot", {"ragged_dot": ragged}),
    _case(9, "Weight-only convolution", {"3x3": _convolution}),
    _case(
        10,
        "Weight first in an einsum",
        {"einsum": functools.partial(_einsum, "bd,dk->bk", ((16, 64),))},
    ),
    _case(11, "Embedding tied to the logits", {"attend": _tied}),
    _case(
        12,
        "Einsum of three operands",
        {"einsum": functools.partial(_einsum, "bd,bk,dk->bk", ((16, 64), (16, 48)))},
    ),
    _case(13, "Activation shaped like the weight", {"eager init": _scores, "offline": _scores}),
    _case(
        14,
        "Two weights of one shape",
        {view: functools.partial(_twins, view) for view in ("transposed", "sliced")},
    ),
)
