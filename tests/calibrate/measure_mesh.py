"""SmolLM2 calibrated on one device and on four, by GPTQ in 4 bits; not run by the tests.

    python tests/calibrate/measure_mesh.py CALIBRATION.npz EVALUATION.npz

Prints the divergence from float32 of each, and exits 1 unless units give equal codes and plain sums
a divergence within 3 % of one device's.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant import recipes
from jaxquant.calibrate import calibrate, Settings, token_batches
from jaxquant.evaluate import read_tokens, score_all
from jaxquant.intercept import prepare
from jaxquant.models import find_smollm2, open_model
from jaxquant.qarray import is_qarray

DEVICES = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--scored", type=int, default=24)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    opened = open_model(find_smollm2())
    vocabulary = opened.config.vocab_size
    tokens = read_tokens(arguments.calibration)[: arguments.windows, : arguments.length]
    batches = token_batches(tokens, vocabulary, size=8)
    plan = jq.plan(opened.model, opened.variables, *batches[0], recipe=recipes.GPTQ_W4_SYM_G64)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    made, models = {}, {}
    for name, where, unit in (
        ("one device", None, None),
        ("four, plain sums", mesh, None),
        ("one device, units of 2", None, 2),
        ("four, units of 2", mesh, 2),
    ):
        start = time.perf_counter()
        settings = Settings(unit=unit)
        found = calibrate(
            opened.model, opened.variables, batches, plan, mesh=where, settings=settings
        )
        made[name] = found.qvariables
        models[name] = jq.wrap(opened.model, plan, prepare(found.qvariables, plan))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    scored = read_tokens(arguments.evaluation)[: arguments.scored]
    rows = score_all(models, jnp.asarray(scored), against=opened.ready())
    one = rows["one device"].kl
    assert one is not None
    for name, row in rows.items():
        assert row.kl is not None
        codes = _codes(made[name])
        same = np.mean(
            [np.mean(a == b) for a, b in zip(codes, _codes(made["one device"]), strict=True)]
        )
        print(
            f"{name}: KL {row.kl:.5f} ({row.kl / one - 1:+.2%}), codes equal to one device's "
            f"{same:.4%}"
        )
    pair = (made["one device, units of 2"], made["four, units of 2"])
    leaves = zip(*map(jax.tree.leaves, pair), strict=True)
    equal = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves)
    print(f"units of 2: every array equal on one device and on four: {equal}")
    plain = rows["four, plain sums"].kl
    assert plain is not None
    return 0 if equal and abs(plain / one - 1) <= 0.03 else 1


def _codes(tree: object) -> list[np.ndarray]:
    found = jax.tree.leaves(tree, is_leaf=is_qarray)
    return [np.asarray(x.codes, np.int8) for x in found if is_qarray(x)]


if __name__ == "__main__":
    sys.exit(main())
