"""Writing named arrays with Orbax. The only file that imports it.

`_zarr.py` reads them: restoring with Orbax takes a second copy of each array on the way to JAX.
"""

import contextlib
import itertools
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

# Large arrays are cut, so that a shard is read without the rest.
_CHUNK_BYTES = 8 << 20


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to `folder`, each a Zarr array in a folder of its name.

    **Raises:** `OSError` if the operating system refuses.
    """
    save_args = {
        name: ocp.SaveArgs(chunk_byte_size=chunk_bytes(array)) for name, array in arrays.items()
    }
    args = ocp.args.PyTreeSave(dict(arrays), save_args=save_args)
    with _quiet(), _checkpointer() as checkpointer:
        try:
            checkpointer.save(folder.absolute(), args=args)
        except ValueError as error:
            # TensorStore says so when the operating system refuses.
            found = re.search(r"os_error_code='(\d+)'", str(error))
            if found is None:
                raise
            code = int(found[1])
            raise OSError(code, os.strerror(code)) from error


def _checkpointer() -> ocp.Checkpointer:
    # Plain Zarr folders of uncompressed chunks: anyone reads them with little code, and a damaged
    # file is one tensor's. Codes hardly compress anyway.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False))


def chunk_bytes(array: np.ndarray) -> int | None:
    """How large chunks may be; `None` if the axes of `array` do not divide well.

    Orbax cuts an axis by its divisors only: a prime number of rows would become a file a row.
    """
    if array.nbytes <= _CHUNK_BYTES:
        return None
    for size in array.shape:
        small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
        divisors = sorted({*small, *(size // d for d in small)})
        if any(b > 16 * a for a, b in itertools.pairwise(divisors)):
            return None
    return _CHUNK_BYTES


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's messages from the terminal: it warns of every group that it is written without
    OCDBT, and writes out tracebacks of errors that it raises as well."""

    def foreign(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(foreign)
    try:
        yield
    finally:
        logger.removeFilter(foreign)
