"""The command line: `jaxquant quantize | evaluate | inspect | bench | compile | demo`."""

import os

# Threads of OpenBLAS, which factors matrices for JAX on a CPU, wait by spinning for some 30 ms
# after each call, on the cores that XLA's products need next. It reads this as it is loaded, which
# the first factorization does.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

from ._main import main as main  # noqa: E402
