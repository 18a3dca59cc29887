"""What is done so far, on disk: each level's results as soon as they are there."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint import CheckpointError
from ..intercept import Root
from ._store import SPILLED

_HEADER = "calibration.json"
_VERSION = 1
_DRAFT = ".draft"
_LEVEL, _FACTORS = "level-", "factors-"
_TOLD = {
    "version": "files, of another jaxquant,",
    "plan": "quantization (the model or the recipe)",
    "data": "data (--calibration, --windows, --length or --batch)",
    "weights": "weights",
    "settings": "settings (Settings, or --forward)",
    "devices": "devices (with Settings(unit=) their number would not matter)",
}
"""What a field of the header is to who gave it."""


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
            for left in folder.glob(f"{SPILLED}*"):
                shutil.rmtree(left, ignore_errors=True)
        else:
            if folder.is_dir() and set(os.listdir(folder)) - {header.with_suffix(_DRAFT).name}:
                # It would be removed at the end, with what is in it.
                raise ValueError(
                    f"{folder} exists and holds no calibration. Give a folder that does not exist "
                    "yet."
                )
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
            held = dict(json.loads(header.read_bytes()))
        except (ValueError, TypeError):
            raise CheckpointError(
                f"{header} is damaged. Remove the folder and start anew."
            ) from None
        now = {"version": _VERSION, **identity}
        for what in (*now, *held):
            if held.get(what) != now.get(what):
                raise ValueError(
                    f"{self.folder} is a calibration with other {_TOLD.get(what, what)}. Resume it "
                    "with what it was started with, or remove the folder."
                )

    def _file(self, level: int, kind: str = _LEVEL) -> Path:
        return self.folder / f"{kind}{level:05d}.npz"

    def _put(self, file: Path, arrays: Mapping[str, np.ndarray]) -> None:
        draft = self.folder / "draft.npz"
        with draft.open("wb") as opened:
            np.savez(opened, **arrays)  # type: ignore[arg-type]
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(draft, file)

    @contextlib.contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        """The arrays of a file; what is wrong with them is a `CheckpointError`."""
        try:
            # Opened here: `numpy.load` would not close a file that it cannot read.
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as held:
                yield held
        except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{file} is damaged: {error}. Remove it, and calibrate again."
            ) from None

    def has(self, level: int) -> bool:
        """Whether a level is finished."""
        return self._file(level).exists()

    def has_factors(self, level: int) -> bool:
        """Whether the scalings of a level are chosen."""
        return self._file(level, _FACTORS).exists()

    def write_factors(self, level: int, factors: Iterable[Any], rows: Iterable[Any]) -> None:
        """Keeps the factors of a level's scalings, in order, and what is told about them."""
        arrays = {str(i): np.asarray(s) for i, s in enumerate(factors)}
        arrays["told"] = _as_text([dataclasses.asdict(row) for row in rows])
        self._put(self._file(level, _FACTORS), arrays)

    def read_factors(self, level: int) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
        """What `write_factors` kept.

        **Raises:** `CheckpointError` if the file is damaged.
        """
        with self._opened(self._file(level, _FACTORS)) as held:
            rows = json.loads(held["told"].tobytes())
            return [held[str(i)] for i in range(len(rows))], rows

    def write(
        self,
        level: int,
        results: Mapping[str, Any],
        rows: Iterable[Any],
        states: Iterable[tuple[str, Root, Mapping[str, Any]]] = (),
    ) -> None:
        """Keeps the arrays of a level (pytrees by name), what is told about its sites, and states.

        States are arrays by name, of a site and a root.
        """
        arrays: dict[str, np.ndarray] = {}
        for number, (name, tree) in enumerate(sorted(results.items())):
            arrays[f"{number}.name"] = np.frombuffer(name.encode(), np.uint8)
            for i, leaf in enumerate(jax.tree.leaves(tree)):
                # As bytes: NumPy's own files do not know the narrow types.
                arrays[f"{number}.{i}"] = _bytes(leaf)
        kept = []
        for site, root, state in states:
            for name, array in state.items():
                facts = {"dtype": np.dtype(array.dtype).name, "shape": list(array.shape)}
                arrays[f"state.{len(kept)}"] = _bytes(array)
                kept.append({"site": site, "root": _told(root), "name": name, **facts})
        told = {"rows": [dataclasses.asdict(row) for row in rows], "states": kept}
        arrays["told"] = _as_text(told)
        self._put(self._file(level), arrays)

    def read(
        self, level: int, structs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[dict[str, Any]], list[tuple[str, Root, dict[str, Any]]]]:
        """The arrays of a level, what was told about its sites, and states.

        `structs` are shapes and dtypes of the arrays, as pytrees by name.

        **Raises:** `CheckpointError` if the file is damaged or holds something else.
        """
        results, states = {}, []
        with self._opened(self._file(level)) as held:
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
            told = json.loads(held["told"].tobytes())
            for i, kept in enumerate(told["states"]):
                root = Root(path=kept["root"][0], steps=tuple(map(tuple, kept["root"][1])))
                struct = jax.ShapeDtypeStruct(tuple(kept["shape"]), jnp.dtype(kept["dtype"]))
                states.append(
                    (kept["site"], root, {kept["name"]: _shaped(held[f"state.{i}"], struct)})
                )
        merged: dict[tuple[str, Root], dict[str, Any]] = {}
        for site, root, state in states:
            merged.setdefault((site, root), {}).update(state)
        return results, told["rows"], [(site, root, x) for (site, root), x in merged.items()]


def finished_levels(folder: Path) -> int:
    """How many levels are kept in a folder, of scalings and of codes; 0 if it does not exist."""
    return sum(len(list(folder.glob(f"{kind}*.npz"))) for kind in (_LEVEL, _FACTORS))


def _as_text(told: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(told).encode(), np.uint8)


def _told(root: Root) -> list[Any]:
    return [root.path, [list(step) for step in root.steps]]


def _shaped(raw: np.ndarray, struct: Any) -> np.ndarray:
    return raw.reshape(-1).view(struct.dtype).reshape(struct.shape)


def _replace(file: Path, content: bytes) -> None:
    draft = file.with_suffix(_DRAFT)
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


def weights_digest(variables: Any) -> str:
    """A digest of all variables: their places, shapes, dtypes and values."""
    digest = hashlib.blake2b()
    for path, leaf in jax.tree.leaves_with_path(variables):
        keys = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        host = np.asarray(jax.random.key_data(leaf) if keys else leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{host.dtype}{host.shape}".encode())
        digest.update(_bytes(host).data)
    return digest.hexdigest()


def _bytes(leaf: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8)
