"""Fashion-MNIST as Debian packages it."""

import dataclasses
import gzip
import pathlib

import numpy as np

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Images `[n, 28, 28, 1]` of 0 to 1, and labels `[n]`."""

    images: np.ndarray
    labels: np.ndarray


def read(folder: pathlib.Path, part: str, count: int | None = None) -> Data:
    """The first `count` of `train` or `t10k`; all without a count.

    **Raises:** `FileNotFoundError`, which says where they come from.
    """
    arrays = []
    for kind, offset in (("images-idx3", 16), ("labels-idx1", 8)):
        file = folder / f"{part}-{kind}-ubyte.gz"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is not there. Run `apt-get install dataset-fashion-mnist`; or, without "
                "root, `apt-get download dataset-fashion-mnist && dpkg -x "
                "dataset-fashion-mnist_*.deb FOLDER`, and give as folder of the data "
                "FOLDER/usr/share/datasets/fashion-mnist."
            )
        with gzip.open(file) as opened:
            arrays.append(np.frombuffer(opened.read(), np.uint8, offset=offset))
    images = arrays[0].reshape(-1, 28, 28, 1)[:count].astype(np.float32) / 255
    return Data(images=images, labels=arrays[1][:count].astype(np.int32))
