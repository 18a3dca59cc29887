"""Models with real weights, other than the language model, by several recipes. See README.md."""

import argparse
import json
import os
import pathlib
import platform
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import efficientnet
import fashion
import jax
import microformer
import minilm
from fashion_mnist import DEBIAN
from sides import Clock, show

HERE = pathlib.Path(__file__).parent
PARTS = ("minilm", "microformer", "efficientnet", "fashion")
# What `--quick` lets a model lose besides: it is half trained, and 1,000 images decide.
QUICK_SLACK = 2.5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--text", type=pathlib.Path, help="paragraphs, an empty line between them")
    parser.add_argument("--images", type=pathlib.Path, help="a folder of photographs")
    parser.add_argument("--fashion", type=pathlib.Path, default=DEBIAN, help="four .gz files")
    parser.add_argument("--weights", type=pathlib.Path, help="where trained ones are kept")
    parser.add_argument("--quick", action="store_true", help="less of it, in the folder quick/")
    parser.add_argument("--out", type=pathlib.Path, help="default: results.json beside this file")
    arguments = parser.parse_args()
    folder = HERE / "quick" if arguments.quick else HERE
    arguments.out = arguments.out or folder / "results.json"
    arguments.weights = arguments.weights or HERE / "quick" / ("small" if arguments.quick else "w")
    return arguments


def measure(part: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """What was found for one part, and what of its claim does not hold."""
    quick = arguments.quick
    if part == "minilm":
        result = minilm.run(arguments.text, 40 if quick else 200, quick)
        columns = {"mean_cosine": ".5f", "least_cosine": ".5f", "same_neighbour": ".3f"}
        show(f"MiniLM, {result['text']}", result["rows"], {"recipe": "", "bits": ".2f"} | columns)
        return result, minilm.broken(result)
    if part == "microformer":
        result = microformer.run(8, 32, quick) if quick else microformer.run(32, 128)
        columns = {"recipe": "", "bits": ".2f", "kl": ".5f", "kl_stderr": ".5f", "top1": ".3f"}
        show(f"microformer, {result['positions']} positions", result["rows"], columns)
        return result, microformer.broken(result)
    if part == "efficientnet":
        pixels = arguments.fashion / "t10k-images-idx3-ubyte.gz"
        result = efficientnet.run(arguments.images, pixels, 1 if quick else 8, quick)
        columns = {
            f"{name}_{key}": spec
            for name in result["images"]
            for key, spec in (("top1", ".3f"), ("correlation", ".5f"))
        }
        show(
            f"EfficientNet-Lite0, images {result['images']}",
            result["rows"],
            {"recipe": "", "folded": "", "bits": ".2f"} | columns,
        )
        return result, efficientnet.broken(result)
    sizes = {"count": 5120, "tests": 1000, "epochs": 1} if quick else {"count": None, "tests": None}
    sizes = {"epochs": 5} | sizes
    result = fashion.run(arguments.fashion, arguments.weights, quick=quick, **sizes)
    columns = {"model": "", "recipe": "", "bits": ".2f", "accuracy": ".2f"}
    show(f"Fashion-MNIST, {result['test']} test images", result["rows"], columns)
    return result, fashion.broken(result, QUICK_SLACK if quick else 0.0)


def main() -> int:
    arguments = parse_arguments()
    clothes = arguments.fashion / "t10k-images-idx3-ubyte.gz"
    if {"efficientnet", "fashion"} & {*arguments.parts} and not clothes.is_file():
        raise SystemExit(
            f"{clothes} is not there. Install Debian's dataset-fashion-mnist, name the folder of "
            "its four files by --fashion, or leave efficientnet and fashion out by --parts."
        )
    clock, complaints = Clock(), []
    # Parts that are not run keep what the file has.
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for part in arguments.parts:
        start = clock()
        results[part], found = measure(part, arguments)
        results[part]["seconds"] = clock() - start
        complaints += found
    results["machine"] = (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs, jax {jax.__version__}"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwrote {arguments.out.name} after {clock():.0f} s")
    print("\n".join(complaints) or "the claim holds")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
