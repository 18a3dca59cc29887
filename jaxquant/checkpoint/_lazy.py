"""Arrays that stay in their file until someone asks for them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ._errors import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LazyArray:
    """An array in a file: shape and dtype are known, the numbers are read on each `read()`.

    Nothing is kept after a read, so a model of lazy leaves costs no memory, and going through it
    leaf by leaf costs its largest leaf. It is a leaf of any pytree (JAX does not look inside).
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], np.ndarray]
    name: str  # What an error calls it: the tensor's name in its file.

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes the array takes once read."""
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The numbers, as a NumPy array.

        Raises:
          CheckpointError: the loader gave another shape or dtype than promised, or a number is NaN
            or infinite.
        """
        array = self.load()
        if array.shape != self.shape or array.dtype != self.dtype:
            raise CheckpointError(
                f"Tensor {self.name!r} was read as {array.dtype}{list(array.shape)}, "
                f"but its header promised {self.dtype}{list(self.shape)}. Fetch the file again."
            )
        _require_finite(array, self.name)
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(
                f"LazyArray {self.name!r} is in its file, so it cannot be had without a copy. "
                f"Leave copy=False out."
            )
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"LazyArray({self.name!r}, {self.dtype}{list(self.shape)})"


def _require_finite(array: np.ndarray, name: str) -> None:
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16):
        return
    # The reduction is in blocks so that the mask of a large leaf is not a second large array.
    flat = array.reshape(-1)
    block = 1 << 20
    for start in range(0, flat.size, block):
        finite = np.isfinite(flat[start : start + block])
        if not finite.all():
            where = start + int(np.argmin(finite))
            index = [int(i) for i in np.unravel_index(where, array.shape)]
            raise CheckpointError(
                f"Tensor {name!r} holds {flat[where]} at {index}; every weight must be finite. "
                f"The file is damaged or its training diverged: fetch it again or use another "
                f"checkpoint."
            )


def materialize(variables: Any) -> Any:
    """`variables` with each `LazyArray` replaced by a JAX array, one leaf after the other.

    Other leaves pass through. At most one leaf exists twice at any time.

    Raises:
      CheckpointError: as `LazyArray.read`.
    """
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf.read()) if isinstance(leaf, LazyArray) else leaf, variables
    )
