"""Checkpoints of a run: Orbax, whole or not there at all, and refused where they do not match."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from .problem import State, TrainingError


def flat(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by path: what is stored does not depend on types of containers."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(keys, simple=True, separator="."): x for keys, x in leaves}
    if len(named) != len(leaves):
        raise ValueError("Two arrays of the state have the same path. Rename one of them.")
    return named


class Checkpoints:
    """The checkpoints in a folder, the last `keep` of them.

    A checkpoint is written beside and renamed, so that a process killed while it writes leaves the
    one before. What `identity` says is stored with each.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, keep: int):
        self.folder = folder.resolve()
        # As it will be read.
        self.identity = json.loads(json.dumps(identity))
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
            ),
            # Named, so that a new process knows how to read what is there.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "identity": ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def latest(self) -> int | None:
        """The step of the last whole checkpoint."""
        return self._manager.latest_step()

    def where(self) -> str:
        """The last checkpoint, in words."""
        if self.latest is None:
            return "no checkpoint was written yet"
        return f"the last checkpoint is {self.folder / str(self.latest)}"

    def save(self, state: State) -> None:
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(flat(state)),
            identity=ocp.args.JsonSave(self.identity),
        )
        self._manager.save(int(state.step), args=arguments)

    def restore(self, state: State, shardings: Any) -> State:
        """The last checkpoint, in place of the values of `state`, lying as `shardings` say.

        **Raises:** `TrainingError` if it is of other settings or of other arrays.
        """
        step = self.latest
        assert step is not None
        at = self.folder / str(step)
        manager = self._manager
        found = manager.restore(step, args=ocp.args.Composite(identity=ocp.args.JsonRestore()))
        self._refuse_other(found["identity"], at)
        held = {
            name: (tuple(x.shape), jnp.dtype(x.dtype))
            for name, x in manager.item_metadata(step)["state"].items()
        }
        wanted = flat(state)
        for name in sorted(held.keys() | wanted.keys()):
            here = wanted.get(name)
            ours = None if here is None else (here.shape, jnp.dtype(here.dtype))
            if held.get(name) != ours:
                raise TrainingError(
                    f"{at} does not match the settings: {name} is {_said(held.get(name))} there "
                    f"and {_said(ours)} here. Give another folder, or the settings it was "
                    "written with."
                )
        places = flat(shardings)
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name])
            for name, x in wanted.items()
        }
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )["state"]
        return jax.tree.unflatten(jax.tree.structure(state), [restored[n] for n in wanted])

    def _refuse_other(self, found: Any, at: Path) -> None:
        differing = [
            f"{name} is {there} there and {here} here"
            for name, there, here in _differences(found, self.identity, "")
        ]
        if differing:
            raise TrainingError(
                f"{at} is of other settings: {'; '.join(differing[:4])}. Give another folder, or "
                "the settings it was written with."
            )

    def close(self) -> None:
        self._manager.close()


def _said(found: tuple[tuple[int, ...], Any] | None) -> str:
    return "missing" if found is None else f"{found[1]}{list(found[0])}"


def _differences(a: Any, b: Any, where: str) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            difference
            for key in sorted(a.keys() | b.keys())
            for difference in _differences(
                a.get(key), b.get(key), f"{where}.{key}" if where else key
            )
        ]
    return [] if a == b else [(where, a, b)]
