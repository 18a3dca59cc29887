"""Checkpoint folders of quantized trees: arrays in groups, and a manifest that says what they are.

The folder is specified in docs/format.md. It changes at one instant, when `manifest.json` is
replaced: whatever happens before leaves the checkpoint that was there, or none.
"""

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from msgspec.structs import replace

from ..intercept import Account, Plan
from ..intercept._variables import states_of, unstamped
from ..qarray import CANONICAL, check_qarray, in_memory, QArray, relayout, WeightError
from ..recipes import scheme_from_dict, scheme_to_dict
from ._errors import CheckpointError
from ._integrity import digests, sync, verify
from ._manifest import (
    encode,
    Error,
    File,
    FORMAT,
    Manifest,
    NAME,
    Part,
    plan_of,
    plan_to_dict,
    read_manifest,
    Tensor,
    version_of,
)
from ._orbax import write_arrays
from ._parts import described, parts_of, shape_of, table_of
from ._placement import assembled, part_shardings, placed_by, Placement
from ._stored import describe as describe_part, dtype_named, read_part, to_stored
from ._tree import build, describe, fill, Leaf

# How much is handed to Orbax at a time: some of what saving needs beside the tree.
_GROUP_BYTES = 32 << 20


def save(
    path: str | os.PathLike[str],
    qvariables: Any,
    plan: Plan,
    *,
    account: Account | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Writes a quantized tree and its plan to the folder `path`, and returns the manifest.

    A checkpoint that is there is replaced, at one instant and only when the new one is complete.
    Errors and notes of `account`, which `quantize` gives, stay for `read_account` and `inspect`.
    `extra_files` (a tokenizer, say) and `metadata` (anything that JSON holds) travel along.
    Leaves are packed one by one: memory beside the tree is its largest leaf, or some 100 MB.
    `progress` is called with each path that is written.

    **Raises:** `CheckpointError` if it cannot be written; `ValueError` if `plan` is not what
    `qvariables` were quantized by, or what `account` is of; `TypeError` for things in the tree that
    are not arrays.

    ```python
    jq.save("out/", qvariables, plan, metadata={"family": "llama"})
    ```
    """
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"save runs in one process; this is one of {jax.process_count()}. Gather the tree in "
            "one process first."
        )
    _, fingerprint = unstamped(qvariables)
    if fingerprint != plan.fingerprint:
        raise ValueError(
            f"These variables were quantized by the plan {fingerprint}, not {plan.fingerprint}. "
            "Save them with the plan that they were quantized by."
        )
    if account is not None and account.plan != plan:
        raise ValueError(
            f"The account is of the plan {account.plan.fingerprint}, not {plan.fingerprint}. Give "
            "the one that came with these variables."
        )
    errors = {} if account is None else account.by_path
    tree, leaves = describe(qvariables)
    tensors = tuple(_with_error(_tensor(index, leaf), errors) for index, leaf in enumerate(leaves))
    groups = list(_groups(tensors))
    metadata = _as_json(metadata or {})
    extra_files = _checked_names(extra_files or {})
    folder = Path(path)
    new = not folder.exists()
    data = f"data-{secrets.token_hex(8)}"
    draft = folder / f"{NAME}.{data}"
    done = False
    try:
        (folder / data / "arrays").mkdir(parents=True)
        for name, members in groups:
            _write_group(folder / data / "arrays" / name, tensors, leaves, members)
            if progress is not None:
                for index in members:
                    progress(tensors[index].path)
        (folder / data / "files").mkdir()
        for name, content in extra_files.items():
            (folder / data / "files" / name).write_bytes(content)
        manifest = Manifest(
            format=FORMAT,
            version=version_of(plan, bool(states_of(qvariables))),
            kind="nnx" if "state" in tree else "linen",
            data=data,
            byte_order="little",
            tensors=tuple(
                _in_group(tensors[index], name) for name, members in groups for index in members
            ),
            tree=tree,
            plan=plan_to_dict(plan),
            metadata=metadata,
            files=tuple(digests(folder / data)),
            notes=() if account is None else account.notes,
        )
        draft.write_bytes(encode(manifest))
        sync(draft)
        sync(folder)
        os.replace(draft, folder / NAME)
        done = True
        sync(folder)
    except OSError as error:
        before = " The checkpoint that was there is as it was." if (folder / NAME).exists() else ""
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}. Make room, or choose another "
            f"folder.{before}"
        ) from error
    finally:
        if not done:
            _forget(folder, data, draft, new)
    _remove_stale(folder, data)
    return manifest


def _forget(folder: Path, data: str, draft: Path, new: bool) -> None:
    """Removes what a save that failed has written."""
    for _ in range(20):
        shutil.rmtree(folder / data, ignore_errors=True)
        if not (folder / data).exists():
            break
        # Where one array failed, others were still being written, and made the folder anew.
        time.sleep(0.05)
    with contextlib.suppress(OSError):
        draft.unlink(missing_ok=True)
        if new:
            folder.rmdir()


def load(
    path: str | os.PathLike[str],
    *,
    sharding: Placement = None,
    template: Any = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Any, Plan]:
    """The quantized tree in the folder `path`, and the plan that it was quantized by.

    Every file is checked before it is used. `sharding` says where tensors go: a sharding for all,
    a function from a tensor's path (as in plans) to its sharding, or a mesh with
    `{pattern: PartitionSpec}`; codes go as the weight would, scales as their tiles allow.
    `template` is a tree of variables (shapes suffice) whose structure the result gets; it is needed
    only for Variable types and metadata that are not Flax's own. Memory beside the tree is its
    largest leaf, or some 100 MB.

    **Raises:** `CheckpointError` naming the file that is missing, cut short or changed, or what
    does not fit the template; `ValueError` for a sharding that does not fit.

    ```python
    qvariables, plan = jq.load("out/", sharding=(mesh, {"*/kernel": P(None, "x"), "*": P()}))
    logits = jq.wrap(model, plan).apply(qvariables, tokens)
    ```
    """
    manifest = read_manifest(path)
    where = str(Path(path) / NAME)
    plan = plan_of(manifest, where)
    place = placed_by(sharding)
    folder = Path(path) / manifest.data
    shapes = [_shape(tensor, where) for tensor in manifest.tensors]
    shardings = [
        part_shardings(tensor.path, shape, place(tensor.path))
        for tensor, shape in zip(manifest.tensors, shapes, strict=True)
    ]
    values: dict[int, Any] = {}
    by_group = itertools.groupby(enumerate(manifest.tensors), lambda pair: _group_of(pair[1]))
    for name, pairs in by_group:
        members = list(pairs)
        _verify(folder, manifest, f"arrays/{name}")
        for index, tensor in members:
            parts: dict[str, Any] = {
                role: read_part(folder / "arrays", part, shardings[index][role])
                for role, part in tensor.parts.items()
            }
            if tensor.prng is not None:
                parts["plain"] = jax.random.wrap_key_data(parts["plain"], impl=tensor.prng)
            values[index] = jax.block_until_ready(assembled(shapes[index], parts))
            if progress is not None:
                progress(tensor.path)
    if template is None:
        return build(manifest.tree, values, plan.fingerprint), plan
    named = [(t.path, t.parameter, values[i]) for i, t in enumerate(manifest.tensors)]
    return fill(template, manifest.tree, named, plan.fingerprint), plan


def read_files(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """The extra files of the checkpoint in the folder `path`.

    **Raises:** `CheckpointError` naming the file that is missing, cut short or changed.
    """
    manifest = read_manifest(path)
    folder = Path(path) / manifest.data
    _verify(folder, manifest, "files")
    names = [file.name for file in manifest.files if file.name.startswith("files/")]
    return {name.removeprefix("files/"): (folder / name).read_bytes() for name in names}


def _tensor(index: int, leaf: Leaf) -> Tensor:
    value, prefix = leaf.value, f"{index:05d}"
    common: dict[str, Any] = {"path": leaf.path, "parameter": leaf.parameter}
    if isinstance(value, QArray):
        try:
            check_qarray(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{leaf.path}: {error}") from None
        # Shapes of the canonical layout: its arrays are made one leaf at a time, when written.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), value)
        value = jax.eval_shape(lambda q: relayout(q, CANONICAL), shapes)
        nested = isinstance(value.scale, QArray)
        return Tensor(
            **common,
            shape=value.shape,
            dtype=value.dtype.name,
            parts=described(value, prefix),
            scheme=scheme_to_dict(value.scheme),
            tile=value.tile,
            table=table_of(value.scheme.values),
            scale_tile=value.scale.tile if nested else None,
            scale_table=table_of(value.scale.scheme.values) if nested else None,
        )
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        part = describe_part(jax.random.key_data(value), f"{prefix}.plain")
        prng = str(jax.random.key_impl(value))
        return Tensor(
            **common, shape=part.shape, dtype=part.dtype, parts={"plain": part}, prng=prng
        )
    part = describe_part(value, f"{prefix}.plain")
    return Tensor(**common, shape=part.shape, dtype=part.dtype, parts={"plain": part})


def _with_error(tensor: Tensor, errors: Mapping[str, WeightError]) -> Tensor:
    found = errors.get(tensor.path) if tensor.parameter else None
    if found is None:
        return tensor
    return replace(tensor, error=Error(relative=found.relative, largest=found.largest))


def _groups(tensors: tuple[Tensor, ...]) -> Iterator[tuple[str, list[int]]]:
    """Runs of tensors that are written together: some tens of MB, or one tensor."""
    names = (f"{i:04d}" for i in itertools.count())
    members: list[int] = []
    held = 0
    for index, tensor in enumerate(tensors):
        size = sum(part.bytes for part in tensor.parts.values())
        if members and held + size > _GROUP_BYTES:
            yield next(names), members
            members, held = [], 0
        members.append(index)
        held += size
    if members:
        yield next(names), members


def _write_group(
    folder: Path, tensors: tuple[Tensor, ...], leaves: list[Leaf], members: list[int]
) -> None:
    arrays = {}
    for index in members:
        value = leaves[index].value
        if isinstance(value, QArray):
            value = relayout(in_memory(value), CANONICAL)
        elif tensors[index].prng is not None:
            value = jax.random.key_data(value)
        held = parts_of(value) if isinstance(value, QArray) else {"plain": value}
        stored = {r: part for r, part in tensors[index].parts.items() if part.bytes > 0}
        for role, part in stored.items():
            arrays[_key(part)] = to_stored(held[role], part.code_bits)
    if arrays:
        write_arrays(folder, arrays)


def _in_group(tensor: Tensor, group: str) -> Tensor:
    parts = {r: replace(p, array=f"{group}/{p.array}") for r, p in tensor.parts.items()}
    return replace(tensor, parts=parts)


def _group_of(tensor: Tensor) -> str:
    return next(iter(tensor.parts.values())).array.partition("/")[0]


def _key(part: Part) -> str:
    return part.array.rpartition("/")[2]


def _shape(tensor: Tensor, where: str) -> Any:
    """Shapes and dtypes of a tensor's parts, as the array or QArray that they make."""
    if tensor.scheme is None:
        plain = tensor.parts["plain"]
        return jax.ShapeDtypeStruct(plain.shape, dtype_named(plain.dtype))
    try:
        return shape_of(tensor, scheme_from_dict(tensor.scheme, where=tensor.path))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} describes {tensor.path} wrongly: {error}") from None


def _verify(folder: Path, manifest: Manifest, inside: str) -> None:
    """Checks the files of one directory of the data folder."""
    holds = {
        f"arrays/{part.array}": f" ({role} of {tensor.path})"
        for tensor in manifest.tensors
        for role, part in tensor.parts.items()
    }

    def words(name: str) -> str:
        return holds.get("/".join(name.split("/")[:3]), "")

    files: list[File] = [f for f in manifest.files if f.name.startswith(f"{inside}/")]
    verify(folder, files, [inside], words)


def _as_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata has to be what JSON can hold: {error}. Turn the value into text or numbers."
        ) from None


def _checked_names(extra_files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    for name in extra_files:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}", name):
            raise ValueError(
                f"{name!r} cannot be the name of an extra file: letters, digits, '_', '-' and '.' "
                "make one, of at most 200 characters, that does not start with '.' or '-'."
            )
    return extra_files


def _remove_stale(folder: Path, data: str) -> None:
    """Removes what earlier saves left, finished or not. The new checkpoint is in place already."""
    for path in folder.iterdir():
        ours = re.fullmatch(r"(manifest\.json\.)?data-[0-9a-f]{16}", path.name)
        if ours is None or path.name == data:
            continue
        try:
            path.unlink() if ours[1] else shutil.rmtree(path)
        except OSError as error:
            warnings.warn(
                f"{path}, of an earlier save, could not be removed: {error}.", stacklevel=3
            )
