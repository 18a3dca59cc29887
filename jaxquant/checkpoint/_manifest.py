"""The manifest: what a checkpoint holds, as JSON with a checksum of its own. See docs/format.md."""

import dataclasses
import hashlib
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from ..intercept import Account, LeafPlan, Plan, SitePlan
from ..intercept._plan import role_axes
from ..intercept._site_plan import ADDED
from ..qarray import Scheme, WeightError
from ..recipes import added_from_data, added_to_data, scheme_from_dict, scheme_to_dict
from ._errors import CheckpointError

NAME = "manifest.json"
FORMAT = "jaxquant checkpoint"
VERSION = 3
READABLE = (1, 2, 3)
_DATA = re.compile(r"data-[0-9a-f]{16}")
# A manifest begins with its own digest, of everything after the digest's closing quote.
_HEAD = re.compile(rb'\{"sha256":"([0-9a-f]{64})"')
_HEAD_BYTES = len(b'{"sha256":""') + 64


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the data folder: its name in it, its size and its SHA-256."""

    name: str
    bytes: int
    sha256: str


Packing = Literal["none", "bits", "nibbles", "bitstring"]


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One stored array. `array` is its folder under `arrays/`.

    `code_bits` are the bits of each element that a bit string holds.
    """

    array: str
    shape: tuple[int, ...]
    dtype: str
    stored_shape: tuple[int, ...]
    stored_dtype: str
    packing: Packing
    bytes: int
    code_bits: int | None = None


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """What quantizing did to a tensor, as in `jaxquant.qarray.WeightError`."""

    relative: float
    largest: float


class Tensor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An array of the model, of the shape and dtype that the model sees.

    `path` is the one in plans. `parts` has the role `plain`, or `codes`, `scale` and perhaps
    `zero_point` and `offset`; then `scheme` and `tile` say how they are meant, and `table` what
    each code stands for where that is not the number itself. Where scales are held as codes, the
    roles `scale.codes`, `scale.scale` and perhaps `scale.offset` take the place of `scale`, with a
    tile and a table of their own. `error` is what was measured when it was quantized. `prng` names
    the generator of a random key, whose data are then the plain part.
    """

    path: str
    parameter: bool
    shape: tuple[int, ...]
    dtype: str
    parts: dict[str, Part]
    scheme: dict[str, Any] | None = None
    tile: tuple[int, ...] | None = None
    table: tuple[float, ...] | None = None
    scale_tile: tuple[int, ...] | None = None
    scale_table: tuple[float, ...] | None = None
    prng: str | None = None
    error: Error | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a checkpoint holds; `jaxquant.checkpoint.read_manifest` reads it.

    `metadata` is what the caller of `save` gave; `tree` is how the tensors nest; `notes` are those
    of the account.
    """

    format: str
    version: int
    kind: Literal["linen", "nnx"]
    data: str
    byte_order: Literal["little"]
    tensors: tuple[Tensor, ...]
    tree: dict[str, Any]
    plan: dict[str, Any]
    metadata: dict[str, Any]
    files: tuple[File, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of all stored arrays: packed codes, scales, zero points and plain arrays."""
        return sum(part.bytes for tensor in self.tensors for part in tensor.parts.values())


class _Header(msgspec.Struct, frozen=True):
    format: str
    version: int


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`."""
    rest = b"," + msgspec.json.encode(manifest)[1:]
    return b'{"sha256":"' + hashlib.sha256(rest).hexdigest().encode() + b'"' + rest


def decode(data: bytes, where: str) -> Manifest:
    """The manifest in `data`.

    **Raises:** `CheckpointError` naming `where` if a byte is not as it was written, or if a newer
    jaxquant wrote it.
    """
    head = _HEAD.match(data)
    if head is None or hashlib.sha256(data[_HEAD_BYTES:]).hexdigest().encode() != head[1]:
        raise CheckpointError(
            f"{where} ({len(data)} bytes) does not match its own checksum: it is damaged or cut "
            "short, or was edited. Use another copy of the checkpoint."
        )
    try:
        header = msgspec.json.decode(data, type=_Header)
        if header.format != FORMAT or header.version not in READABLE:
            raise CheckpointError(
                f"{where} is of format {header.format!r}, version {header.version}; this jaxquant "
                f"reads {FORMAT!r}, versions {READABLE[0]} to {VERSION}. Install a newer jaxquant."
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{where} is no manifest: {error}.") from None
    names = [file.name for file in manifest.files]
    names += [part.array for tensor in manifest.tensors for part in tensor.parts.values()]
    if not _DATA.fullmatch(manifest.data) or any(
        name.startswith("/") or "\\" in name or ".." in name.split("/") for name in names
    ):
        raise CheckpointError(f"{where} names files outside its folder. Do not use it.")
    return manifest


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the checkpoint in the folder `path`. Reads no arrays.

    **Raises:** `CheckpointError` if there is none, it is damaged, or it is of a newer version.

    ```python
    manifest = jq.checkpoint.read_manifest("out/")
    print(manifest.metadata, manifest.bytes)
    ```
    """
    file = Path(path) / NAME
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path} holds no {NAME}: it is not a folder that jaxquant wrote, or its first save "
            "was interrupted. Give the folder that was passed to save, or save again."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from None
    return decode(data, str(file))


def read_account(path: str | os.PathLike[str]) -> Account:
    """The account of the checkpoint in the folder `path`: its plan, and errors if it has them.

    Reads no arrays.

    **Raises:** as `read_manifest`.

    ```python
    print(jq.checkpoint.read_account("out/"))
    ```
    """
    manifest = read_manifest(path)
    plan = plan_of(manifest, str(Path(path) / NAME))
    measured = {t.path: t.error for t in manifest.tensors if t.parameter and t.error is not None}
    return Account(
        plan=plan,
        notes=manifest.notes,
        errors=tuple(
            (leaf.path, WeightError(relative=error.relative, largest=error.largest))
            for leaf in plan.leaves
            if (error := measured.get(leaf.path)) is not None
        ),
    )


def plan_of(manifest: Manifest, where: str) -> Plan:
    """The plan of a checkpoint.

    **Raises:** `CheckpointError` naming `where` if it cannot be read.
    """
    counts = tuple((t.path, math.prod(t.shape)) for t in manifest.tensors if t.parameter)
    return dataclasses.replace(plan_from_dict(manifest.plan, where), counts=counts)


def version_of(plan: Plan, has_states: bool) -> int:
    """The least version whose readers compute with the checkpoint as `plan` says.

    Version 2 knew no state of sites, no static activations and no outliers.
    """
    added = has_states or any(s.static or s.outliers or s.training or s.adapter for s in plan.sites)
    return VERSION if added else 2


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """A plan as plain data. What sites have beside schemes is as in a recipe, or left out.

    **Raises:** `ValueError` for an algorithm or scaling that has no name as text.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Scheme):
            return scheme_to_dict(value)
        return list(value) if isinstance(value, tuple) else value

    def fields(row: Any) -> dict[str, Any]:
        names = [f.name for f in dataclasses.fields(row) if f.name not in ADDED]
        return {name: plain(getattr(row, name)) for name in names}

    return {
        "recipe": plan.recipe,
        "fingerprint": plan.fingerprint,
        "sites": [fields(site) | added_to_data(site) for site in plan.sites],
        "leaves": [fields(leaf) for leaf in plan.leaves],
        "others": [list(row) for row in plan.others],
        "sizes": [list(row) for row in plan.sizes],
    }


def plan_from_dict(data: dict[str, Any], where: str) -> Plan:
    """The plan that `plan_to_dict` wrote, without counts: the tensors of a checkpoint tell them.

    **Raises:** `CheckpointError` naming `where` if it is none.
    """

    def typed(value: Any, place: str) -> Any:
        if isinstance(value, dict):
            return scheme_from_dict(value, where=place)
        return tuple(value) if isinstance(value, list) else value

    def row(kind: Any, fields: dict[str, Any], place: str) -> Any:
        known = {f.name for f in dataclasses.fields(kind)}.difference(ADDED)
        added = added_from_data(fields, place) if kind is SitePlan else {}
        given = {k: typed(v, f"{place}, {k}") for k, v in fields.items() if k in known}
        return kind(**given, **added)

    try:
        sites = tuple(row(SitePlan, s, f"{where}, {s['site']}") for s in data["sites"])
        roles = {s.path: role_axes(s.roles) for s in reversed(sites) if s.weights and s.roles}
        leaves = data["leaves"]
        if any("contracted" not in leaf for leaf in leaves):
            # Version 1 kept the roles of axes with the sites alone.
            axes = [
                dict(zip(("contracted", "stack"), roles[s["path"]], strict=True)) for s in leaves
            ]
            leaves = [{**leaf, **own} for leaf, own in zip(leaves, axes, strict=True)]
        return Plan(
            recipe=data["recipe"],
            sites=sites,
            leaves=tuple(row(LeafPlan, s, f"{where}, {s['path']}") for s in leaves),
            others=tuple((path, ops) for path, ops in data["others"]),
            sizes=tuple((path, size) for path, size in data["sizes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where} holds a plan that this jaxquant cannot read: {error}. Install the jaxquant "
            "that wrote it, or a newer one."
        ) from None
