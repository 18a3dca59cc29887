"""Values between segments: in memory up to a bound, in files beyond it."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SPILLED = "activations-"
"""How the folders of arrays that did not fit begin."""


class Store:
    """Arrays by a number and a batch. What would not fit `memory` bytes lies in a file.

    Use as a context manager: files are gone afterwards. `folder` is where they go, by default one
    of the system's for temporary files.
    """

    def __init__(self, memory: int, folder: str | os.PathLike[str] | None = None):
        self.memory = memory
        self.held = 0
        self.spilled = 0
        self._arrays: dict[tuple[int, int], Any] = {}
        self._files: dict[tuple[int, int], tuple[Path, Any]] = {}
        self._folder = None if folder is None else Path(folder)
        self._made: Path | None = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._arrays.clear()
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)

    def put(self, value: int, batch: int, array: Any) -> None:
        """Keeps an array.

        **Raises:** `OSError` if it has to go to a file and cannot.
        """
        size = array.size * array.dtype.itemsize
        if self.held + size <= self.memory:
            self._arrays[value, batch] = array
            self.held += size
            return
        if self._made is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._made = Path(tempfile.mkdtemp(prefix=SPILLED, dir=self._folder))
        file = self._made / f"{value}-{batch}"
        host = np.asarray(array)
        # Raw bytes: NumPy's own files do not know bfloat16.
        host.tofile(file)
        if (written := file.stat().st_size) != host.nbytes:
            raise OSError(
                f"{file} holds {written} bytes of {host.nbytes}: is the disk full? Make room, or "
                "give more memory (Settings)."
            )
        self._files[value, batch] = (file, jax.ShapeDtypeStruct(host.shape, host.dtype))
        self.spilled += size

    def get(self, value: int, batch: int) -> Any:
        """The array that was kept."""
        key = (value, batch)
        if key in self._arrays:
            return self._arrays[key]
        file, struct = self._files[key]
        return jnp.asarray(np.fromfile(file, struct.dtype).reshape(struct.shape))

    def drop(self, value: int, batch: int) -> None:
        """Forgets an array that nobody will read any more."""
        key = (value, batch)
        if key in self._arrays:
            array = self._arrays.pop(key)
            self.held -= array.size * array.dtype.itemsize
        else:
            self._files.pop(key)[0].unlink()
