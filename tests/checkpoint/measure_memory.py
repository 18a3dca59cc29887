"""Saves or loads some 200 MB and prints what it took; run by test_folder_memory.py."""

import json
import pathlib
import sys
import threading
import time

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import PartitionSpec as P
from quantized_trees import plan_of, some_qarray

from jaxquant.checkpoint import load, save
from jaxquant.intercept import stamped
from jaxquant.numerics import BFLOAT16, INT4, INT8
from jaxquant.qarray import bytes_held, is_qarray, PER_CHANNEL, Scheme, Tile

MATRICES = 24
INT4_G64 = Scheme(values=INT4, tile=Tile(contracted=64), scale=BFLOAT16)
INT8_CHANNEL = Scheme(values=INT8, tile=PER_CHANNEL)


def tree():
    qarrays = {
        f"layer_{i}/kernel": some_qarray((2048, 2048), INT4_G64 if i % 2 else INT8_CHANNEL)
        for i in range(2 * MATRICES)
    } | {"embed/embedding": some_qarray((16384, 1024), INT8_CHANNEL)}
    params: dict = {}
    for path, q in qarrays.items():
        module, name = path.split("/")
        params[module] = {name: q, "scale": jnp.ones(2048)}
    plan = plan_of(qarrays)
    return stamped({"params": params}, plan.fingerprint), plan


class Peak:
    """The most memory that the process has, above what it had before."""

    def __enter__(self):
        self.process, self.done = psutil.Process(), False
        self.before = self.most = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done:
            self.most = max(self.most, self.process.memory_info().rss)
            time.sleep(0.001)

    def __exit__(self, *error):
        self.done = True
        self.thread.join()


def main(what: str, folder: str) -> None:
    if what == "save":
        qvariables, plan = tree()
        jax.block_until_ready(qvariables)
        with Peak() as peak:
            save(folder, qvariables, plan)
    else:
        mesh = jax.make_mesh((jax.device_count(),), ("x",))
        placement = None if what == "load" else (mesh, {"*/kernel": P(None, "x"), "*": P("x")})
        jnp.ones(3).block_until_ready()
        with Peak() as peak:
            qvariables, _ = load(folder, sharding=placement)
    packed = jax.tree.leaves(qvariables, is_leaf=is_qarray)
    files = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    found = {
        "beyond": peak.most - peak.before,
        "tree": sum(x.nbytes for x in jax.tree.leaves(qvariables)),
        "packed": sum(map(bytes_held, packed)),
        "files": sum(path.stat().st_size for path in files),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
