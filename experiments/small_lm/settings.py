"""What a run is, as TOML: the model and the text that all runs share, and one run each."""

import dataclasses
from pathlib import Path

from training_loop import Devices, Loop, Optimizer, read_settings, Settings

CONFIGS = Path(__file__).parents[2] / "configs" / "experiments" / "small_lm"


class Model(Settings):
    """Sizes of a Llama, which the vocabulary of the tokenizer completes."""

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5


class Text(Settings):
    """How text becomes windows: tokens of the vocabulary, tokens of a window, what is held out."""

    vocabulary: int
    length: int
    held_out: list[str]
    windows: int


class Shared(Settings):
    """The settings file `model.toml`."""

    model: Model
    text: Text


class Distillation(Settings):
    """`(1 - weight) * NLL + weight * KL(teacher || model)` (Hinton et al. 2015, temperature 1).

    `teacher` is the name of a run.
    """

    teacher: str
    weight: float


class Run(Settings):
    """One training. `start` names the run whose weights it starts from; without, from nothing.

    `recipe` is a file beside this one; without, nothing is quantized. `sub_norms` puts norms before
    the two linears of a block that have none (SubLN).
    """

    what: str
    loop: Loop
    optimizer: Optimizer
    recipe: str | None = None
    start: str | None = None
    sub_norms: bool = False
    distillation: Distillation | None = None
    devices: Devices = Devices()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """A run with its name and its folder, which are those of its file."""

    name: str
    run: Run
    folder: Path

    @property
    def needs(self) -> tuple[str, ...]:
        """The runs that have to be there before."""
        teacher = self.run.distillation and self.run.distillation.teacher
        return tuple(dict.fromkeys(name for name in (self.run.start, teacher) if name))


def read_shared(configs: Path = CONFIGS) -> Shared:
    return read_settings(configs / "model.toml", Shared)


def read_run(name: str, configs: Path = CONFIGS) -> Named:
    """The run that a file of `configs` describes.

    **Raises:** `ValueError` for a name without a file, or for what is wrong in it.
    """
    path = configs / f"{name}.toml"
    if not path.is_file():
        known = sorted(p.stem for p in configs.glob("*.toml") if p.stem != "model")
        raise ValueError(f"There is no run {name!r}. Those that are: {', '.join(known)}.")
    return Named(name=name, run=read_settings(path, Run), folder=configs)
