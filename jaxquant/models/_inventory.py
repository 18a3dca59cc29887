"""What a model weighs: every tensor, with its true bits per value."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ..checkpoint import GGUFFile, HuggingFaceFolder, read_account, read_manifest
from ..checkpoint._integrity import verify
from ..intercept import Account
from ..intercept._variables import parameters, unstamped
from ..qarray import bytes_held, QArray
from ..recipes import scheme_from_dict

_SAFETENSORS_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16}
"""Types of other names take a byte a value (`I8`, `U8`, `BOOL`, `F8_E4M3`, ...)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSize:
    """One tensor. `bytes` include scales and zero points; `scheme` is what its source calls it.

    What the plan of a folder of ours says of it: the `rule` that decided, the `reason` why it is
    left as it is; and `sqnr_db`, its signal to quantization noise, where there is some and it was
    measured.
    """

    path: str
    shape: tuple[int, ...]
    scheme: str
    bytes: int
    rule: str | None = None
    reason: str | None = None
    sqnr_db: float | None = None

    @property
    def parameters(self) -> int:
        """How many values it stands for."""
        return math.prod(self.shape)

    @property
    def bits_per_value(self) -> float:
        """`8 bytes / parameters`."""
        return 8.0 * self.bytes / max(self.parameters, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inventory:
    """The tensors of a model and their sums."""

    tensors: tuple[TensorSize, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, packed."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        """Values of all tensors."""
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """`8 bytes / parameters`."""
        return 8.0 * self.bytes / max(self.parameters, 1)


def variables_inventory(variables: Any, account: Account | None = None) -> Inventory:
    """The parameters of a model, float or quantized, by path, and what `account` says of them."""
    own, _ = unstamped(variables)
    return Inventory(
        tensors=tuple(
            TensorSize(
                path=path,
                shape=tuple(x.shape),
                scheme=_scheme(x),
                bytes=bytes_held(x),
                **_said(account, path),
            )
            for path, x in parameters(own).items()
        )
    )


def _scheme(x: Any) -> str:
    return str(x.scheme if isinstance(x, QArray) else x.dtype)


def _said(account: Account | None, path: str) -> dict[str, Any]:
    """Rule, reason and noise of a parameter: those of the site that quantizes it, if one does."""
    if account is None:
        return {}
    sites = [site for site in account.sites if site.path == path]
    held = [site for site in sites if site.reason is None]
    if held:
        return {"rule": held[0].rule, "reason": None, "sqnr_db": held[0].sqnr_db}
    if sites:
        reasons = dict.fromkeys(str(site.reason) for site in sites)
        return {"rule": sites[0].rule, "reason": "; ".join(reasons), "sqnr_db": None}
    read = dict(account.plan.others).get(path)
    return {"rule": None, "reason": f"no site; read by {read}", "sqnr_db": None}


def checkpoint_inventory(path: Path) -> Inventory:
    """The parameters in a folder of ours, of whatever model, as it stores them.

    **Raises:** `CheckpointError` if any of its files is not as it was written.
    """
    manifest = read_manifest(path)
    verify(path / manifest.data, manifest.files, ["arrays", "files"], lambda name: "")
    account = read_account(path)
    tensors = []
    for tensor in manifest.tensors:
        if not tensor.parameter:
            continue
        scheme = tensor.dtype
        if tensor.scheme is not None:
            scheme = str(scheme_from_dict(tensor.scheme, where=tensor.path))
        tensors.append(
            TensorSize(
                path=tensor.path,
                shape=tensor.shape,
                scheme=scheme,
                bytes=sum(part.bytes for part in tensor.parts.values()),
                **_said(account, tensor.path),
            )
        )
    return Inventory(tensors=tuple(tensors))


def gguf_inventory(file: GGUFFile) -> Inventory:
    """The tensors of a GGUF file as it stores them, by its own names."""
    return Inventory(
        tensors=tuple(
            TensorSize(path=name, shape=info.shape, scheme=info.type.name, bytes=info.nbytes)
            for name, info in file.tensors.items()
        )
    )


def huggingface_inventory(folder: HuggingFaceFolder) -> Inventory:
    """The tensors of a Hugging Face folder as it stores them, by its own names."""
    return Inventory(
        tensors=tuple(
            TensorSize(
                path=name,
                shape=stored.shape,
                scheme=stored.type,
                bytes=math.prod(stored.shape) * _SAFETENSORS_BITS.get(stored.type, 8) // 8,
            )
            for name, stored in sorted(folder.tensors.items())
        )
    )
