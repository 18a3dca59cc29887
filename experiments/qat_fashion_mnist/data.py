"""Fashion-MNIST as Debian packages it, and batches of it that a seed and a step decide."""

import dataclasses
import gzip
import pathlib
from collections.abc import Iterator

import numpy as np

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10


class DataMissing(FileNotFoundError):
    """The four files are not where they should be; the message says how to get them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Images `[n, 28, 28, 1]` of 0 to 1, and labels `[n]`."""

    images: np.ndarray
    labels: np.ndarray


def read(folder: pathlib.Path, part: str, count: int) -> Data:
    """The first `count` of `train` or `t10k`.

    **Raises:** `DataMissing`.
    """
    arrays = []
    for kind, offset in (("images-idx3", 16), ("labels-idx1", 8)):
        file = folder / f"{part}-{kind}-ubyte.gz"
        if not file.is_file():
            raise DataMissing(
                f"{file} is not there. Run `apt-get install dataset-fashion-mnist`; or, without "
                "root, `apt-get download dataset-fashion-mnist && dpkg -x "
                "dataset-fashion-mnist_*.deb FOLDER`, and give "
                "--data FOLDER/usr/share/datasets/fashion-mnist."
            )
        with gzip.open(file) as opened:
            arrays.append(np.frombuffer(opened.read(), np.uint8, offset=offset))
    images = arrays[0].reshape(-1, 28, 28, 1)[:count].astype(np.float32) / 255
    return Data(images=images, labels=arrays[1][:count].astype(np.int32))


def batches(data: Data, size: int, steps: int, seed: int) -> Iterator[tuple[np.ndarray, ...]]:
    """`steps` batches: every image once an epoch, mirrored at random; the rest of one is left."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = rng.permutation(len(data.labels))
        rows, order = order[:size], order[size:]
        images = data.images[rows]
        mirrored = rng.integers(2, size=(size, 1, 1, 1)) > 0
        yield np.where(mirrored, images[:, :, ::-1], images), data.labels[rows]
