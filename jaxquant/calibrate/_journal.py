"""What is done so far, on disk: each level's results as soon as they are there."""

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..checkpoint import CheckpointError

_HEADER = "calibration.json"
_VERSION = 1


class Journal:
    """The results of finished levels in a folder, one file a level, complete or not there.

    `identity` says what is being done (plan, data, settings); a folder of something else is
    refused. Without `resume`, one with results is refused as well.

    **Raises:** `ValueError` for a folder that does not fit; `CheckpointError` if it is damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str], *, resume: bool):
        self.folder = folder
        header = folder / _HEADER
        if header.exists():
            self._check(header, identity, resume)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            written = json.dumps({"version": _VERSION, **identity}, indent=1).encode()
            _replace(header, written)

    def _check(self, header: Path, identity: Mapping[str, str], resume: bool) -> None:
        if not resume:
            raise ValueError(
                f"{self.folder} holds an unfinished calibration. Resume it (resume=True, or "
                "--resume), or remove the folder."
            )
        try:
            held = json.loads(header.read_bytes())
        except ValueError:
            raise CheckpointError(
                f"{header} is damaged. Remove the folder and start anew."
            ) from None
        for what, now in {"version": _VERSION, **identity}.items():
            if held.get(what) != now:
                raise ValueError(
                    f"{self.folder} is a calibration with another {what} ({held.get(what)}, not "
                    f"{now}). Resume it with what it was started with, or remove the folder."
                )

    def _file(self, level: int) -> Path:
        return self.folder / f"level-{level:05d}.npz"

    def has(self, level: int) -> bool:
        """Whether a level is finished."""
        return self._file(level).exists()

    def write(self, level: int, results: Mapping[str, Any], rows: Iterable[Any]) -> None:
        """Keeps the arrays of a level (pytrees by name) and what is told about its sites."""
        arrays: dict[str, np.ndarray] = {}
        for number, (name, tree) in enumerate(sorted(results.items())):
            arrays[f"{number}.name"] = np.frombuffer(name.encode(), np.uint8)
            for i, leaf in enumerate(jax.tree.leaves(tree)):
                # As bytes: NumPy's own files do not know the narrow types.
                arrays[f"{number}.{i}"] = _bytes(leaf)
        told = json.dumps([dataclasses.asdict(row) for row in rows]).encode()
        arrays["rows"] = np.frombuffer(told, np.uint8)
        draft = self.folder / "draft.npz"
        with draft.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self._file(level))

    def read(self, level: int, structs: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of a level; `structs` are their shapes and dtypes, as pytrees by name.

        **Raises:** `CheckpointError` if the file is damaged or holds something else.
        """
        results = {}
        try:
            # Opened here: `numpy.load` would not close a file that it cannot read.
            with self._file(level).open("rb") as file, np.load(file, allow_pickle=False) as held:
                numbers = {
                    held[key].tobytes().decode(): key.removesuffix(".name")
                    for key in held.files
                    if key.endswith(".name")
                }
                for name, struct in structs.items():
                    leaves, tree = jax.tree.flatten(struct)
                    read = [
                        _shaped(held[f"{numbers[name]}.{i}"], leaf) for i, leaf in enumerate(leaves)
                    ]
                    results[name] = jax.tree.unflatten(tree, read)
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{self._file(level)} is damaged: {error}. Remove it, and calibrate again."
            ) from None
        return results

    def rows(self, level: int) -> list[dict[str, Any]]:
        """What was told about the sites of a level."""
        with np.load(self._file(level), allow_pickle=False) as held:
            return json.loads(held["rows"].tobytes())


def _shaped(raw: np.ndarray, struct: Any) -> np.ndarray:
    return raw.reshape(-1).view(struct.dtype).reshape(struct.shape)


def _replace(file: Path, content: bytes) -> None:
    draft = file.with_suffix(".draft")
    with draft.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(draft, file)


def digest_of(batches: Iterable[tuple[Any, ...]]) -> str:
    """A digest of calibration data: its values, shapes and dtypes."""
    digest = hashlib.sha256()
    for batch in batches:
        for leaf in jax.tree.leaves(batch):
            host = np.asarray(leaf)
            digest.update(f"{host.dtype}{host.shape}".encode())
            digest.update(_bytes(host).data)
    return digest.hexdigest()


def _bytes(leaf: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8)
