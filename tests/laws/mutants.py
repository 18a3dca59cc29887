"""Small wrong changes of the number and array layers, each of which some test must find.

`python tests/laws/mutants.py [number ...]` applies each to a copy of the package, runs the tests
named beside it, and writes what found it to `mutants.json`. `test_mutants.py` checks that each
original text is still in the source. It takes some minutes, and is run by hand.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = pathlib.Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`file` is below `jaxquant/`, `tests` below `tests/`; `only` is pytest's `-k`."""

    file: str
    original: str
    mutated: str
    what: str
    tests: str
    only: str = ""


CAST, PACK, SCALE = "numerics/_cast.py", "numerics/_pack.py", "numerics/_scale.py"
TABLES, QUANTIZE = "numerics/_tables.py", "qarray/_quantize.py"
TEST_CAST, TEST_PACK, TEST_SCALE = (f"numerics/test_{x}.py" for x in ("cast", "pack", "scale"))
TEST_LAWS, TEST_SCHEMES = "laws/test_format_laws.py", "laws/test_schemes.py"
TEST_RANDOM = "laws/test_random_rounding.py"

MUTANTS = [
    Mutant(
        CAST,
        "jnp.where(jnp.isnan(x), 0.0, jnp.round(x)).astype",
        "jnp.where(jnp.isnan(x), 0.0, jnp.floor(x + 0.5)).astype",
        "ties of integers go up",
        TEST_CAST,
        "nearest_code and INT3",
    ),
    Mutant(
        CAST,
        "x = jnp.clip(x.astype(jnp.float32), format.lowest, format.highest)",
        "x = x.astype(jnp.float32)",
        "nothing is clipped to the ends",
        TEST_CAST,
        "infinities",
    ),
    Mutant(
        CAST,
        "lax.bitcast_convert_type(jnp.round(magnitude * inverse) * step",
        "lax.bitcast_convert_type(jnp.floor(magnitude * inverse) * step",
        "six-bit floats are cut off",
        TEST_CAST,
        "nearest_code and E3M2",
    ),
    Mutant(
        CAST,
        "code = jnp.where(small < 1 << m, small, normal)",
        "code = jnp.maximum(normal, 0)",
        "six-bit floats have no subnormal numbers",
        TEST_CAST,
        "nearest_code and E2M3",
    ),
    Mutant(
        CAST,
        "value = jnp.where(code < 1 << m, small, normal)",
        "value = normal",
        "subnormal codes are decoded as normal ones",
        TEST_CAST,
        "stands_for and E3M2",
    ),
    Mutant(
        CAST,
        "place = place + (x > middle).astype(jnp.int32)",
        "place = place + (x >= middle).astype(jnp.int32)",
        "ties in tables go to the higher value",
        TEST_CAST,
        "tie_in_a_table",
    ),
    Mutant(
        CAST,
        "jnp.float32) < x - below",
        "jnp.float32) < 0.5",
        "random rounding tosses a coin",
        TEST_RANDOM,
        "on_average and INT",
    ),
    Mutant(
        CAST,
        "chance * (high - low) < x - low, high, low)",
        "chance * (high - low) < high - x, high, low)",
        "random rounding in tables prefers the farther neighbour",
        TEST_RANDOM,
        "on_average and NF4",
    ),
    Mutant(
        CAST,
        "exponent = jnp.maximum(exponent, least) - mantissa",
        "exponent = exponent - mantissa",
        "random rounding knows no subnormal numbers",
        TEST_RANDOM,
        "on_average and E2M1",
    ),
    Mutant(
        TABLES,
        "0.16093020141124725",
        "0.16093050141124725",
        "one digit of NF4",
        "numerics/test_formats.py",
        "NF4",
    ),
    Mutant(
        TABLES,
        "np.where(count < (2**i + 1) // 2, low, high)",
        "np.where(count < 2**i + 1, low, high)",
        "the ends of the dynamic map are counted from one side",
        "numerics/test_tables.py",
    ),
    Mutant(
        PACK,
        "byte = byte | (runs[..., i, :] << np.uint8(i * width))",
        "byte = byte | (runs[..., -i, :] << np.uint8(i * width))",
        "runs are packed in another order",
        TEST_PACK,
        "by_hand",
    ),
    Mutant(
        PACK,
        "for w in (4, 2, 1) if format.bits & w",
        "for w in (1, 2, 4) if format.bits & w",
        "parts of codes are packed in another order",
        TEST_PACK,
        "by_hand",
    ),
    Mutant(
        PACK,
        "half = 2 ** (format.bits - 1)",
        "half = 8",
        "signs are extended from the fourth bit",
        TEST_PACK,
        "by_hand",
    ),
    Mutant(
        SCALE,
        "return _over(end, (format.highest - format.lowest) / 2)",
        "return _over(end, format.highest)",
        "the convention MIDDLE is HIGHEST",
        TEST_SCALE,
        "meets_the_end",
    ),
    Mutant(
        SCALE,
        "jnp.where(jnp.abs(low) >= jnp.abs(high), -end, end)",
        "jnp.where(jnp.abs(low) > jnp.abs(high), -end, end)",
        "of two peaks the positive one is met",
        TEST_SCALE,
        "meets_the_end",
    ),
    Mutant(
        SCALE,
        "shared = (bits >> 23) - (exponent - 1)",
        "shared = (bits >> 23) - exponent",
        "shared exponents are one too small",
        TEST_SCALE,
        "exponent",
    ),
    Mutant(
        SCALE,
        "((bits & (2**23 - 1)) > largest)",
        "((bits & (2**23 - 1)) >= largest)",
        "CEIL raises what fits exactly",
        TEST_SCALE,
        "exponent",
    ),
    Mutant(
        SCALE,
        "ends = jnp.asarray([(100 - percent) / 2,",
        "ends = jnp.asarray([100 - percent,",
        "percentiles cut twice as much below",
        TEST_SCALE,
        "percentiles",
    ),
    Mutant(
        SCALE,
        "jnp.where(now < least, factors[i], kept)",
        "jnp.where(now <= least, factors[i], kept)",
        "of equal factors the narrowest is kept",
        TEST_SCALE,
        "equal_factors",
    ),
    Mutant(
        SCALE,
        "return (error**rule.power).sum(",
        "return (error**2).sum(",
        "errors are squared, whatever the rule says",
        TEST_SCALE,
        "factor_of_the_grid",
    ),
    Mutant(
        SCALE,
        "return unit * statistic(x * (1 / unit))",
        "return statistic(x)",
        "sums of large numbers overflow",
        TEST_SCALE,
        "extreme",
    ),
    Mutant(
        QUANTIZE,
        "wanted if scheme.codes_first else scale_values(q)",
        "wanted",
        "codes are chosen for scales that are not stored",
        "qarray/test_quantize.py",
        "as_it_is_stored",
    ),
    Mutant(
        QUANTIZE,
        "shifted = jnp.round(shifted) if key is None",
        "shifted = shifted if key is None",
        "zero points are added before rounding",
        "qarray/test_quantize.py",
        "tie",
    ),
    Mutant(
        QUANTIZE,
        "jnp.maximum(size, highest * np.float32(least / scheme.values.highest))",
        "size",
        "small scales become 0",
        TEST_SCHEMES,
        "any_size and nvfp4 and one",
    ),
    Mutant(
        QUANTIZE,
        "size = jnp.where(size == 0, jnp.where(highest == 0, 1.0, highest), size)",
        "size = jnp.where(size == 0, 1.0, size)",
        "a tile of zeros spoils the scales of the others",
        TEST_SCHEMES,
        "power_of_two and nvfp4",
    ),
    Mutant(
        QUANTIZE,
        "piece = lax.slice_in_dim(values, start, limit, axis=axis)",
        "piece = lax.slice_in_dim(values, 0, limit - start, axis=axis)",
        "short tiles have the scale of the first values",
        TEST_LAWS,
        "each_piece_alone",
    ),
    Mutant(
        "qarray/_qarray.py",
        "return lax.slice(full, (0,) * full.ndim, tuple(shape))",
        "return lax.slice(full, [a - b for a, b in zip(full.shape, shape)], full.shape)",
        "ragged tiles are short at the start",
        TEST_LAWS,
        "each_piece_alone",
    ),
    Mutant(
        SCALE,
        "return jnp.maximum(product, np.finfo(np.float32).min) + term",
        "return product + term",
        "a product and a sum are fused",
        "qarray/test_qarray.py",
        "centered",
    ),
    Mutant(
        "qarray/_scheme.py",
        "for axis in sorted(axes, reverse=True):",
        "for axis in sorted(axes):",
        "tiles run along the first axis",
        "qarray/test_scheme.py",
        "by_hand",
    ),
    Mutant(
        "qarray/_reshape.py",
        "lax.slice_in_dim(part, start // tile, -(-limit // tile), axis=stored)",
        "lax.slice_in_dim(part, start // tile, limit // tile, axis=stored)",
        "the scale of a short tile is sliced off",
        TEST_LAWS,
        "moving_axes",
    ),
    Mutant(
        "qarray/_relayout.py",
        "(i - q.ndim, short[a]) for i, a in enumerate(move)",
        "(a - q.ndim, short[a]) for i, a in enumerate(move)",
        "short tiles stay on the axis where they were",
        "qarray/test_relayout.py",
        "ragged",
    ),
]


def run(mutant: Mutant) -> str | None:
    """The first test that the mutant fails, or `None` where it survives."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "jaxquant"
        shutil.copytree(ROOT / "jaxquant", copy, ignore=shutil.ignore_patterns("__pycache__"))
        path = copy / mutant.file
        text = path.read_text(encoding="utf-8")
        assert text.count(mutant.original) == 1, mutant
        path.write_text(text.replace(mutant.original, mutant.mutated), encoding="utf-8")
        only = ["-k", mutant.only] if mutant.only else []
        # -P: the package must not come from the folder in which this runs.
        command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "--tb=no", "-rfE", f"tests/{mutant.tests}", *only],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode != 1 or not failed:
        raise RuntimeError(f"The tests of {mutant.what!r} did not run:\n{done.stdout[-2000:]}")
    return failed[0].removeprefix("FAILED ").partition(" - ")[0]


def main(numbers: list[int]) -> None:
    """Runs the mutants with these numbers, or all, and writes down what found each."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for i in numbers or range(len(MUTANTS)):
        killer = run(MUTANTS[i])
        known[MUTANTS[i].what] = killer
        print(f"{i:2} {MUTANTS[i].what}: {killer or 'SURVIVES'}", flush=True)
        results = {m.what: known[m.what] for m in MUTANTS if m.what in known}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main([int(number) for number in sys.argv[1:]])
