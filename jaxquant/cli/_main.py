"""What can be typed, and what is said when it does not work."""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..aot import TARGETS
from ..ops import Refusal
from ._bench import BENCHES, run_bench
from ._bench_quantize import SIZE
from ._calibrate import FORWARD
from ._compile import prefill_of, run_compile
from ._demo import run_demo
from ._evaluate import run_evaluate
from ._inspect import run_inspect
from ._quantize import run_quantize
from ._windows import LENGTH

EXPECTED = (ValueError, OSError, Refusal, ImportError)
"""What the library raises for input that it cannot use. Anything else is a bug, and looks it."""

_MODEL = "a .gguf file, a Hugging Face folder or hub id (org/name), or a folder that jaxquant wrote"
_JSON = "write the result here too"
_RECIPE = "a recipe's name (w8a16, w4a16_g64, w8a8, fp8, ...) or a .toml file"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0; 2 after one line on stderr; 130 when interrupted."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except KeyboardInterrupt as interrupt:
        said = f"; {interrupt}" if interrupt.args else ""
        print(f"jaxquant: interrupted{said}", file=sys.stderr)
        return 130
    except EXPECTED as error:
        print(f"jaxquant: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def one_line(error: BaseException) -> str:
    """What `error` says, its lines joined."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    text = "; ".join(line for line in lines if line) or type(error).__name__
    return text.replace(":; ", ": ")


class _Parser(argparse.ArgumentParser):
    """`argparse` prints the usage before an error; here an error is one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxquant", description="Quantize JAX models, and see what it costs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, run: object) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(run=run)
        return added

    quantize = command("quantize", "Quantize MODEL into the folder OUT.", run_quantize)
    quantize.add_argument("model", metavar="MODEL", help=_MODEL)
    quantize.add_argument("out", metavar="OUT", type=pathlib.Path, help="a new folder")
    quantize.add_argument("--recipe", required=True, metavar="NAME_OR_FILE", help=_RECIPE)
    _add_calibration(quantize)
    _add_json(quantize)

    evaluate = command("evaluate", "Score MODEL on tokens, alone or against another.", run_evaluate)
    evaluate.add_argument("model", metavar="MODEL", help=_MODEL)
    source = evaluate.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--tokens",
        metavar="FILE.npz",
        type=pathlib.Path,
        help="with an integer array `tokens` [windows, length]",
    )
    source.add_argument(
        "--text", metavar="FILE", type=pathlib.Path, help="text, cut into windows of --length"
    )
    evaluate.add_argument("--against", metavar="MODEL", help="the reference for KL and top-1")
    evaluate.add_argument(
        "--length",
        type=_positive,
        default=LENGTH,
        help=f"tokens a window of --text (default {LENGTH})",
    )
    evaluate.add_argument(
        "--batch", type=_positive, default=1, help="windows scored at a time (default 1)"
    )
    _add_json(evaluate)

    inspect = command("inspect", "List the tensors of MODEL and what they cost.", run_inspect)
    inspect.add_argument("model", metavar="MODEL", help=_MODEL)
    _add_json(inspect)

    bench = command(
        "bench",
        "Time float32 and recipes, or quantizing, side by side; or what compilers say of kernels.",
        run_bench,
    )
    bench.add_argument("name", metavar="NAME", choices=BENCHES, help=", ".join(BENCHES))
    bench.add_argument("--model", metavar="MODEL", help=f"{_MODEL} (default: SmolLM2)")
    bench.add_argument(
        "--recipe",
        metavar="NAME_OR_FILE",
        action="append",
        help=f"{_RECIPE}; may be given again (default: five that suit a CPU)",
    )
    bench.add_argument("--rounds", type=_positive, default=10, help="rounds timed (default 10)")
    bench.add_argument(
        "--length", type=_positive, default=512, help="tokens of prefill (default 512)"
    )
    bench.add_argument(
        "--size",
        type=_positive,
        default=SIZE,
        help=f"rows and columns of the weight of bench quantize (default {SIZE}: 1.07 GB)",
    )
    bench.add_argument(
        "--target",
        metavar="CHIP",
        action="append",
        help="v4, v5e, v5p, v6e, 7x, h100 or all, of bench kernels (default v5e and v6e; of a TPU "
        "schedules, of h100 registers and instructions) and bench compile-matrix (default all); "
        "may be given again",
    )
    bench.add_argument(
        "--jobs", type=_positive, default=2, help="processes that compile (default 2)"
    )
    bench.add_argument("--quick", action="store_true", help="compile fewer cases")
    _add_json(bench)

    compile_ = command(
        "compile", "What MODEL needs on chips that are not here, by their compiler.", run_compile
    )
    compile_.add_argument(
        "model", metavar="MODEL_OR_CONFIG", help=f"{_MODEL}; or a config.json without weights"
    )
    compile_.add_argument(
        "--recipe",
        metavar="NAME_OR_FILE",
        help=f"{_RECIPE} (default: the model as it is, in bfloat16 if it is a float one)",
    )
    compile_.add_argument(
        "--target",
        required=True,
        metavar="CHIP[:SHAPE]",
        help=f"{', '.join(TARGETS)}, alone for one device or with a slice: v5e:2x4, h100:8",
    )
    compile_.add_argument(
        "--batch", type=_positive, default=1, help="rows decoded at a time (default 1)"
    )
    compile_.add_argument(
        "--length", type=_positive, default=4096, help="tokens of the cache (default 4096)"
    )
    compile_.add_argument(
        "--prefill",
        metavar="[ROWSx]TOKENS",
        type=prefill_of,
        help="the prompt that is read at once, or none (default: a row of --length tokens)",
    )
    _add_json(compile_)

    demo = command("demo", "Quantize SmolLM2 with five recipes and compare.", run_demo)
    demo.add_argument("--quick", action="store_true", help="fewer windows and rounds")
    demo.add_argument(
        "--out",
        metavar="DIR",
        type=pathlib.Path,
        default=pathlib.Path("out/demo"),
        help="where demo.json and demo.png go (default out/demo)",
    )
    return parser


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        metavar="TEXT_OR_NPZ",
        type=pathlib.Path,
        help="data for a recipe that needs it: a .npz file with an integer array `tokens` "
        "[windows, length], or text, cut into windows of --length",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with what was stopped, in OUT.calibration"
    )
    parser.add_argument(
        "--windows", metavar="N", type=_positive, help="calibrate on the first N windows"
    )
    parser.add_argument(
        "--length", type=_positive, help=f"tokens a window of text (default {LENGTH})"
    )
    parser.add_argument("--batch", type=_positive, help="windows run at a time (default 8)")
    parser.add_argument(
        "--forward",
        choices=FORWARD,
        help=f"in what sites multiply while calibrating (default {FORWARD[0]})",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help=_JSON)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number
