"""EfficientNet-Lite0, an image classifier, in Flax Linen: EfficientNet (Tan and Le 2019,
arXiv:1905.11946) without squeeze-and-excitation and with ReLU6, which Google made for integer
arithmetic: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from ..checkpoint import open_torch
from ._llama_weights import cast_dtype
from ._origins import CONVOLUTION, lazy_tree, Origin, TRANSPOSED

DType = Any
_EPSILON = 1e-3  # Of batch normalization, as TensorFlow has it.
_STEM, _TOP = 32, 1280


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stage:
    """Equal blocks, the first of which has the stride and the change of width."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    inputs: int
    outputs: int


_STAGES = (
    _Stage(blocks=1, kernel=3, stride=1, expansion=1, inputs=32, outputs=16),
    _Stage(blocks=2, kernel=3, stride=2, expansion=6, inputs=16, outputs=24),
    _Stage(blocks=2, kernel=5, stride=2, expansion=6, inputs=24, outputs=40),
    _Stage(blocks=3, kernel=3, stride=2, expansion=6, inputs=40, outputs=80),
    _Stage(blocks=3, kernel=5, stride=1, expansion=6, inputs=80, outputs=112),
    _Stage(blocks=4, kernel=5, stride=2, expansion=6, inputs=112, outputs=192),
    _Stage(blocks=1, kernel=3, stride=1, expansion=6, inputs=192, outputs=320),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Style:
    """What all convolutions of one model share."""

    folded: bool
    dtype: DType
    param_dtype: DType

    def conv(
        self,
        x: Float[Array, "batch height width inputs"],
        features: int,
        *,
        name: str,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
    ) -> Float[Array, "batch new_height new_width outputs"]:
        """A convolution, padded as TensorFlow's SAME (which puts the odd row at the end), and its
        normalization, `NAME_norm`, unless that is folded into it.
        """
        x = nn.Conv(
            features,
            (kernel, kernel),
            strides=(stride, stride),
            padding="SAME",
            feature_group_count=features if depthwise else 1,
            use_bias=self.folded,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )(x)
        if self.folded:
            return x
        norm = nn.BatchNorm(
            use_running_average=True,
            epsilon=_EPSILON,
            dtype=jnp.float32,
            param_dtype=jnp.float32,  # As its averages are held, whatever the rest is.
            name=f"{name}_norm",
        )
        return norm(x.astype(jnp.float32)).astype(self.dtype)


class InvertedBottleneck(nn.Module):
    """Wider by a 1x1 convolution, along the image by a depthwise one, narrower by a 1x1 one."""

    expansion: int
    outputs: int
    kernel: int
    stride: int
    folded: bool = False
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch new_height new_width outputs"]:
        style = _Style(folded=self.folded, dtype=self.dtype, param_dtype=self.param_dtype)
        inputs = x.shape[-1]
        wide = inputs * self.expansion
        y = x
        if self.expansion != 1:
            y = jax.nn.relu6(style.conv(y, wide, name="expand"))
        y = style.conv(
            y, wide, name="depthwise", kernel=self.kernel, stride=self.stride, depthwise=True
        )
        y = style.conv(jax.nn.relu6(y), self.outputs, name="project")
        return x + y if self.stride == 1 and inputs == self.outputs else y


class EfficientNetLite0(nn.Module):
    """Images to the logits of `classes`; for inference: normalization uses its running averages.

    With `folded`, there is no normalization and every convolution has a bias: see
    `fold_batch_norm`. Made for 224 x 224 pixels, of values as `normalize_pixels` gives; whatever
    else has at least 32 of them a side goes through as well.
    """

    classes: int = 1000
    folded: bool = False
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width three"]
    ) -> Float[Array, "batch classes"]:
        style = _Style(folded=self.folded, dtype=self.dtype, param_dtype=self.param_dtype)
        x = images.astype(self.dtype)
        x = jax.nn.relu6(style.conv(x, _STEM, name="stem", kernel=3, stride=2))
        for number, (stage, first) in enumerate(_blocks()):
            x = InvertedBottleneck(
                expansion=stage.expansion,
                outputs=stage.outputs,
                kernel=stage.kernel,
                stride=stage.stride if first else 1,
                folded=self.folded,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"blocks_{number}",
            )(x)
        x = jax.nn.relu6(style.conv(x, _TOP, name="top"))
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2)).astype(self.dtype)
        return nn.Dense(
            self.classes, dtype=self.dtype, param_dtype=self.param_dtype, name="classifier"
        )(x)


def _blocks() -> list[tuple[_Stage, bool]]:
    """Each block's stage, and whether it is the first of it."""
    return [(stage, number == 0) for stage in _STAGES for number in range(stage.blocks)]


def normalize_pixels(pixels: np.ndarray) -> np.ndarray:
    """`(pixels - 127) / 128` in float32, for pixels of 0 to 255: what EfficientNet-Lite was
    trained on.
    """
    return (np.asarray(pixels, np.float32) - 127.0) / 128.0


def fold_batch_norm(variables: Any, *, epsilon: float = _EPSILON) -> dict[str, Any]:
    """Variables of `EfficientNetLite0` (or of any model that names the normalization after a
    convolution `NAME` `NAME_norm`) with each normalization folded into its convolution.

    With `s = scale / sqrt(var + epsilon)`, the kernel `K` becomes `K * s` along its output channels
    and the bias `(b - mean) * s + bias`. Computed in float64 on the host, and rounded once to the
    kernel's dtype. The result has no `batch_stats`, and is for a model with `folded=True`.

    Folding comes before quantization: scales are then chosen for the weights that are multiplied.

    Raises:
      ValueError: a normalization stands beside no convolution of its name, and would be lost.
    """
    return {
        name: part for name, part in variables.items() if name not in ("params", "batch_stats")
    } | {"params": _folded(variables["params"], variables.get("batch_stats", {}), epsilon, ())}


def _folded(params: Any, stats: Any, epsilon: float, path: tuple[str, ...]) -> dict[str, Any]:
    norms = {name for name, part in stats.items() if "mean" in part}
    out = {}
    for name, part in params.items():
        if name in norms:
            continue
        if f"{name}_norm" in norms and "kernel" in part:
            part = _folded_conv(part, params[f"{name}_norm"], stats[f"{name}_norm"], epsilon)
        elif isinstance(part, dict):
            part = _folded(part, stats.get(name, {}), epsilon, (*path, name))
        out[name] = part
    alone = sorted(
        name for name in norms if "kernel" not in out.get(name.removesuffix("_norm"), {})
    )
    if alone:
        raise ValueError(
            f"{'/'.join((*path, alone[0]))} normalizes no convolution named "
            f"{alone[0].removesuffix('_norm')!r} beside it. Name the two NAME and NAME_norm."
        )
    return out


def _folded_conv(conv: Any, norm: Any, stats: Any, epsilon: float) -> dict[str, Any]:
    def wide(x: Any) -> np.ndarray:
        return np.asarray(x, np.float64)

    scale = 1 / np.sqrt(wide(stats["var"]) + epsilon)
    if "scale" in norm:
        scale = scale * wide(norm["scale"])
    shift = (wide(conv["bias"]) if "bias" in conv else 0) - wide(stats["mean"])
    bias = shift * scale + (wide(norm["bias"]) if "bias" in norm else 0)
    dtype = np.dtype(conv["kernel"].dtype)
    kernel = wide(conv["kernel"]) * scale
    return {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.asarray(bias, dtype)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LoadedEfficientNet:
    """An EfficientNet-Lite0 on its way from a file; nothing large is in memory yet."""

    model: EfficientNetLite0
    variables: Any  # Each leaf a `LazyArray`: see `checkpoint.materialize`.
    source: str


def load_efficientnet_lite0(
    path: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> LoadedEfficientNet:
    """The model in a PyTorch file with the names of lukemelas/EfficientNet-PyTorch, as in
    `find_efficientnet_lite0()`; nothing in it is executed.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: it is damaged, or of another architecture.
    """
    file = open_torch(path)
    classes = file.lazy("_fc.bias").size
    model = EfficientNetLite0(classes, False, dtype, cast_dtype(param_dtype))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = lazy_tree(
        shapes,
        efficientnet_origins(),
        file,
        where=str(path),
        unused=lambda name: name.endswith(".num_batches_tracked"),
    )
    return LoadedEfficientNet(model=model, variables=variables, source=file.describe())


def efficientnet_origins() -> dict[tuple[str, ...], Origin]:
    """For each variable of `EfficientNetLite0()`, its tensor in a PyTorch file."""
    origins: dict[tuple[str, ...], Origin] = {
        ("params", "classifier", "kernel"): Origin(name="_fc.weight", axes=TRANSPOSED),
        ("params", "classifier", "bias"): Origin(name="_fc.bias"),
    }

    def conv(path: tuple[str, ...], name: str, norm: str) -> None:
        *above, last = path
        normed = (*above, f"{last}_norm")
        origins["params", *path, "kernel"] = Origin(name=f"{name}.weight", axes=CONVOLUTION)
        origins["params", *normed, "scale"] = Origin(name=f"{norm}.weight")
        origins["params", *normed, "bias"] = Origin(name=f"{norm}.bias")
        origins["batch_stats", *normed, "mean"] = Origin(name=f"{norm}.running_mean")
        origins["batch_stats", *normed, "var"] = Origin(name=f"{norm}.running_var")

    conv(("stem",), "_conv_stem", "_bn0")
    conv(("top",), "_conv_head", "_bn1")
    for number, (stage, _) in enumerate(_blocks()):
        block, theirs = f"blocks_{number}", f"_blocks.{number}"
        if stage.expansion != 1:
            conv((block, "expand"), f"{theirs}._expand_conv", f"{theirs}._bn0")
        conv((block, "depthwise"), f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        conv((block, "project"), f"{theirs}._project_conv", f"{theirs}._bn2")
    return origins
