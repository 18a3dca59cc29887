"""EfficientNet-Lite0 by each recipe, beside float32: on crops of photographs and on clothes."""

import gzip
import importlib.util
import pathlib
from typing import Any

import numpy as np
from PIL import Image
from sides import batched, sides_of

import jaxquant as jq
from jaxquant import recipes
from jaxquant.checkpoint import materialize
from jaxquant.models import (
    find_efficientnet_lite0,
    fold_batch_norm,
    load_efficientnet_lite0,
    normalize_pixels,
)

SIZE = 224
_INT8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
# One scale for a whole kernel: where folding matters, since it makes channels unequal.
W8_TENSOR = jq.Recipe(
    name="w8_tensor",
    source="one scale a tensor, as in Jacob et al. 2018 (arXiv:1712.05877)",
    rules=(jq.Rule(match="*", weights=jq.Scheme(values=jq.INT8, tile=jq.PER_TENSOR)),),
)
W8A8_ZERO = jq.Recipe(
    name="w8a8_zero",
    source="w8a8 with zero points in the activations, which ReLU6 leaves without negative numbers",
    rules=(
        jq.Rule(
            match="*",
            weights=_INT8,
            activations=jq.Scheme(
                values=jq.INT8, tile=jq.PER_CHANNEL, range=jq.MinMax(), zero_point=jq.INT8
            ),
        ),
    ),
)
RECIPES = (recipes.W8A16, recipes.W8A8, W8_TENSOR)
# In the sample photographs of scikit-image and scikit-learn: colour, and of things or people.
PHOTOGRAPHS = {
    "skimage/data": (
        *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"),
        *("motorcycle_left.png", "motorcycle_right.png"),
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
# Share of images on which the likeliest class is float32's, photographs, folded or not.
# (57 and 56 of 64 were found; 64 have a standard error of 0.04), and mean correlation of logits.
LEAST_TOP1 = {"w8a16": 0.78, "w8a8": 0.75}
LEAST_CORRELATION = {"w8a16": 0.99, "w8a8": 0.985}


def photographs(folder: pathlib.Path | None) -> dict[str, Image.Image]:
    """The images of a folder, or of the two packages, which are found and not imported."""
    if folder is not None:
        kinds = (".jpg", ".jpeg", ".png")
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in kinds)
    else:
        files = []
        for place, names in PHOTOGRAPHS.items():
            package, _, inside = place.partition("/")
            spec = importlib.util.find_spec(package)
            roots = (spec.submodule_search_locations or []) if spec else []
            files += [pathlib.Path(root) / inside / name for root in roots for name in names]
        files = [file for file in files if file.is_file()]
    if not files:
        raise FileNotFoundError(
            "No photographs were found. Run: pip install --no-deps scikit-image==0.26.0 "
            "scikit-learn==1.9.1, or give --images FOLDER."
        )
    return {file.stem: Image.open(file).convert("RGB") for file in files}


def crops(images: dict[str, Image.Image], each: int, seed: int = 0) -> np.ndarray:
    """Random squares of each image, at least half its short side wide, half of them mirrored."""
    rng = np.random.default_rng(seed)
    out = []
    for image in images.values():
        short = min(image.size)
        for _ in range(each):
            side = int(short * rng.uniform(0.5, 1.0))
            left, top = (int(rng.integers(length - side + 1)) for length in image.size)
            part = image.crop((left, top, left + side, top + side))
            pixels = np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            out.append(pixels[:, ::-1] if rng.integers(2) else pixels)
    return normalize_pixels(np.stack(out))


def clothes(file: pathlib.Path, count: int) -> np.ndarray:
    """The first images of Fashion-MNIST, eight times as large, in three equal colours."""
    with gzip.open(file) as opened:
        pixels = np.frombuffer(opened.read(), np.uint8, offset=16).reshape(-1, 28, 28)[:count]
    large = [
        np.asarray(Image.fromarray(x).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for x in pixels
    ]
    return normalize_pixels(np.repeat(np.stack(large)[..., None], 3, axis=-1))


def compared(logits: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Agreement, and the mean over images of the correlation of their logits."""
    ours, theirs = (x - x.mean(axis=1, keepdims=True) for x in (logits, reference))
    correlation = np.sum(ours * theirs, axis=1) / np.sqrt(
        np.sum(ours**2, axis=1) * np.sum(theirs**2, axis=1)
    )
    return {
        "top1": float(np.mean(logits.argmax(1) == reference.argmax(1))),
        "correlation": float(correlation.mean()),
    }


def run(
    folder: pathlib.Path | None, fashion: pathlib.Path, each: int, quick: bool = False
) -> dict[str, Any]:
    """Rows of agreements, one for each recipe, with normalization as it is and folded in."""
    loaded = load_efficientnet_lite0(find_efficientnet_lite0())
    plain = materialize(loaded.variables)
    images = photographs(folder)
    sets = {"photographs": crops(images, each)}
    sets["clothes"] = clothes(fashion, len(sets["photographs"]))
    batch = 8
    models = {
        False: (loaded.model, plain, RECIPES),
        True: (loaded.model.clone(folded=True), fold_batch_norm(plain), (*RECIPES, W8A8_ZERO)),
    }
    if quick:
        sets.pop("clothes")
        models = {True: (*models[True][:2], (recipes.W8A16, recipes.W8A8))}
    rows: list[dict[str, Any]] = []
    references: dict[str, np.ndarray] = {}
    for folded, (model, variables, wanted) in models.items():
        example = sets["photographs"][:batch]
        for side in sides_of(model, variables, wanted, example):
            row: dict[str, Any] = {
                "recipe": side.name,
                "folded": folded,
                "bits": side.bits,
                "sites": side.sites,
            }
            for name, pixels in sets.items():
                logits = batched(side.call, batch, pixels).astype(np.float64)
                reference = references.setdefault(name, logits)
                row |= {f"{name}_{key}": x for key, x in compared(logits, reference).items()}
            rows.append(row)
    return {
        "photographs": sorted(images),
        "images": {name: len(pixels) for name, pixels in sets.items()},
        "rows": rows[1:],
    }


def broken(result: dict[str, Any]) -> list[str]:
    """What of the claim does not hold."""
    limits = {"photographs_correlation": LEAST_CORRELATION}
    # Of fewer, the share says too little.
    if result["images"]["photographs"] >= 64:
        limits["photographs_top1"] = LEAST_TOP1
    return [
        f"EfficientNet {row['recipe']}{' folded' if row['folded'] else ''}: {key} "
        f"{row[key]:.3f}, {least[row['recipe']]} claimed"
        for row in result["rows"]
        for key, least in limits.items()
        if row["recipe"] in least and not row[key] >= least[row["recipe"]]
    ]
