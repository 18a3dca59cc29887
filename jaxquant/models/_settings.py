"""Settings that a foreign file states, read with their kinds checked."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from ..checkpoint import CheckpointError

Config = TypeVar("Config")


class Settings:
    """Settings by key, with their kinds checked."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = values
        self.where = where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`; null and absent mean `default`, and without a default an error."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(
                    f"{self.where} has no {key}. The file is incomplete: fetch it again."
                )
            return default
        fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
        if not fits or (kind is not bool and isinstance(value, bool)):
            raise CheckpointError(
                f"{self.where}: {key} is {str(value)[:60]!r}, and a {kind.__name__} was wanted. "
                f"Fetch the file again."
            )
        try:
            return kind(value)
        except OverflowError:
            raise CheckpointError(f"{self.where}: {key} is too large for a float.") from None

    def require(self, key: str, *wanted: Any) -> None:
        """Refuses a file in which `key` is present and none of `wanted`."""
        if self.values.get(key) is not None and self.values[key] not in wanted:
            raise self.refuse(key, " or ".join(map(repr, wanted)))

    def refuse(self, key: str, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: {key} is {self.values[key]!r}, which is not implemented; wanted "
            f"{wanted}. Use another model."
        )

    def layers(self, tensors: Collection[str], key: str) -> int:
        """The number of layers, which no model is built for unless the file could hold them."""
        layers = self.get(key, int)
        if not 1 <= layers <= len(tensors):
            raise CheckpointError(
                f"{self.where}: {key} is {layers}, and the file has {len(tensors)} tensors in "
                f"all. It is damaged: fetch it again."
            )
        return layers

    def build(self, config: Callable[..., Config], **fields: Any) -> Config:
        """`config(**fields)`, whose complaint becomes one of the file."""
        try:
            return config(**fields)
        except ValueError as error:
            raise CheckpointError(f"{self.where}: {error}") from None


def check_heads(name: str, heads: int, width: int) -> None:
    """Refuses heads that do not divide the width of the stream.

    Raises:
      ValueError: they do not; `name` is what the message calls the config.
    """
    if heads < 1 or width % heads:
        raise ValueError(
            f"{name} has {heads} heads for a width of {width}, which they do not divide. Correct "
            "the config."
        )
