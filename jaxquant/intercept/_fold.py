"""What folds are: see `_folds`, which finds them."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float32

from ._channels import Channels
from ._mark import Root


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A parameter, or a slice of one, that is divided by `s`.

    `channels` broadcasts to it and says which element of `s` (flattened) each element is divided
    by; -1 is none.
    """

    root: Root
    channels: Channels

    def __str__(self) -> str:
        return str(self.root)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SiteRef:
    """A site, the `root` of whose weight is multiplied by `s`; `channels` as in `Source`."""

    site: str
    root: Root
    channels: Channels

    def __str__(self) -> str:
        return str(self.root)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """Sites that read one input, and the parameters that it is in proportion to.

    `s` has the shape `shape`: `[k]` in the order of the weights' columns in matrix form, with the
    stack axes of the sites before it if these can be scaled each by itself (experts). Where inputs
    have to be scaled alike (a key head that several query heads share) `channels` names for each
    the first of its class, and -1 for those that cannot be scaled; it is `None` where each input
    has a factor of its own.
    """

    sites: tuple[SiteRef, ...]
    sources: tuple[Source, ...]
    shape: tuple[int, ...]
    channels: Channels | None = dataclasses.field(default=None, repr=False)

    def __str__(self) -> str:
        ends = (_braced(tuple(map(str, part))) for part in (self.sources, self.sites))
        return " -> ".join(ends)


def _braced(paths: tuple[str, ...]) -> str:
    """`a/{x,y}/b` for `a/x/b` and `a/y/b`."""
    split = [path.split("/") for path in paths]
    if {len(parts) for parts in split} == {max(2, len(split[0]))}:
        differ = [i for i, names in enumerate(zip(*split, strict=True)) if len({*names}) > 1]
        if len(differ) == 1:
            (i,) = differ
            names = ",".join(dict.fromkeys(parts[i] for parts in split))
            return "/".join([*split[0][:i], f"{{{names}}}", *split[0][i + 1 :]])
    return ", ".join(dict.fromkeys(paths))


def tie(s: Any, fold: Fold, *, largest: bool = False) -> Float32[np.ndarray, "..."]:
    """`s` made constant within each class of `fold`, and 1 where nothing can be scaled.

    A class gets the geometric mean of its members, or the largest.

    **Raises:** `ValueError` if `s` has another shape than `fold`, or is not positive and finite.
    """
    s = checked(s, fold)
    if fold.channels is None:
        return s
    flat, classes = s.reshape(-1).astype(np.float64), fold.channels.reshape(-1)
    out = np.ones_like(flat)
    real = classes >= 0
    _, members = np.unique(classes[real], return_inverse=True)
    if largest:
        combined = np.zeros(int(members.max(initial=-1)) + 1)
        np.maximum.at(combined, members, flat[real])
    else:
        combined = np.exp(np.bincount(members, np.log(flat[real])) / np.bincount(members))
    out[real] = combined[members]
    return out.reshape(s.shape).astype(np.float32)


def checked(s: Any, fold: Fold) -> Float32[np.ndarray, "..."]:
    """`s` in float32.

    **Raises:** `ValueError` if it has another shape than `fold`, or is not positive and finite.
    """
    s = np.asarray(s).astype(np.float32)
    if s.shape != fold.shape:
        raise ValueError(f"The fold {fold} takes factors {fold.shape}, not {s.shape}.")
    bad = ~(np.isfinite(s) & (s > 0))
    if bad.any():
        where = [int(i) for i in np.argwhere(bad)[0]]
        raise ValueError(
            f"The fold {fold} was given the factor {s[tuple(where)]} at {where}. Factors have to "
            "be positive and finite."
        )
    return s
