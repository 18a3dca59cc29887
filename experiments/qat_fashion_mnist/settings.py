"""What is run, in numbers: data, steps, learning rates, and what the claim allows."""

import dataclasses

MODELS = ("cnn", "vit")
BITS = (8, 4, 3, 2)
ENDS = 8  # Bits of the first and of the last layer.
FLOAT, TUNED = "float32", "float32_tuned"
LSQ, STE, FIXED, PTQ = "lsq", "ste", "ste_fixed", "ptq"
METHODS = (LSQ, FIXED, STE, PTQ)
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """So many passes over the training images; AdamW, warmed up, then down to 0 along a cosine."""

    epochs: float
    rate: float
    decay: float
    warmup: int = 100  # Steps.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One size of the experiment.

    `learned_rate` is that of learned scales, a part of them a step: Adam, the same cosine, no
    weight decay. Quantization starts from the trained float model. `tests` are the images that
    decide, all of them in the full run; `calibration` those that ranges are taken from.
    """

    images: int
    tests: int
    batch: int
    calibration: int
    first: dict[str, Schedule]
    tuned: dict[str, Schedule]
    learned_rate: float
    runs: tuple[tuple[str, int], ...]  # Methods with bits, beside the two in float32.
    seeds: tuple[int, ...]
    # Points of test accuracy, means over seeds.
    most_lost: float  # LSQ at 4 bits, against the better of the two float32 runs.
    least_won: float  # LSQ at 2 bits, against plain straight-through at 2 bits: more than this.


MOST_FLIPPED = 1e-3  # Of the test images, by converting.

FULL = Settings(
    images=60_000,
    tests=10_000,
    batch=128,
    calibration=512,
    first={
        "cnn": Schedule(epochs=5, rate=3e-3, decay=1e-2),
        "vit": Schedule(epochs=6, rate=2e-3, decay=1e-2),
    },
    tuned={
        "cnn": Schedule(epochs=1.5, rate=1e-3, decay=1e-2),
        "vit": Schedule(epochs=1.5, rate=5e-4, decay=1e-2),
    },
    learned_rate=5e-3,
    # `ste_fixed` searches ranges in every step, which costs as much again: only where it decides.
    runs=((FIXED, 2), *((method, bits) for method in (LSQ, STE, PTQ) for bits in BITS)),
    seeds=SEEDS,
    most_lost=0.5,
    least_won=0.0,
)

# A tenth of the training, 2,000 images of the test, one seed: the standard error of the difference
# of two accuracies near 85 % is then about a point.
QUICK = dataclasses.replace(
    FULL,
    images=6_400,
    tests=2_000,
    batch=64,
    calibration=256,
    first={
        "cnn": Schedule(epochs=1.5, rate=3e-3, decay=1e-2, warmup=20),
        "vit": Schedule(epochs=2.5, rate=2e-3, decay=1e-2, warmup=20),
    },
    tuned={
        "cnn": Schedule(epochs=1, rate=1e-3, decay=1e-2, warmup=10),
        "vit": Schedule(epochs=1, rate=1e-3, decay=1e-2, warmup=10),
    },
    runs=((LSQ, 4), (LSQ, 2), (STE, 2), (PTQ, 2)),
    seeds=(0,),
    most_lost=4.0,
    least_won=-2.0,
)
