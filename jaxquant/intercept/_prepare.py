"""From the canonical layout to the one that a backend reads fast: once, leaf by leaf."""

import dataclasses
from typing import Any

from ..numerics import least_block
from ..ops.dot import BACKENDS, layout_for, preferred_backend
from ..qarray import Layout, QArray, relayout
from ._plan import Plan, role_axes, SitePlan
from ._variables import map_leaves


def prepare(
    qvariables: Any, plan: Plan, *, backend: str | None = None, packed: bool = False
) -> Any:
    """The same QArrays, stored as `backend` reads them; values and results stay what they are.

    `backend` is a name in `BACKENDS`, by default the one that suits the device that JAX runs on, or
    that of the mesh in force (`jax.set_mesh`).
    `packed` keeps codes of less than 8 bits in no more than these, where a CPU would otherwise
    spend a byte on each: half the memory for 4 bits, at a speed that `experiments/cpu_dot` tells.
    Checkpoints hold the canonical layout whatever was prepared.

    **Raises:** `ValueError` for an unknown backend.

    ```python
    qvariables = jq.prepare(qvariables, plan)
    ```
    """
    if backend is None:
        backend = preferred_backend()
    if backend not in BACKENDS:
        raise ValueError(
            f"There is no backend named {backend!r}. It is one of {', '.join(BACKENDS)}."
        )
    by_path = deciding(plan)

    def one(path: str | None, leaf: Any) -> Any:
        if path is None or not isinstance(leaf, QArray) or path not in by_path:
            return leaf
        return relayout(leaf, stored_layout(leaf, by_path[path], backend, packed))

    return map_leaves(one, qvariables)


def deciding(plan: Plan) -> dict[str, SitePlan]:
    """The site whose op says how a parameter is stored, by the parameter's path."""
    quantized = [site for site in plan.sites if site.weights is not None]
    # A lookup reads rows, which any layout gives; where there is a product too, that decides.
    by_weight = sorted(quantized, key=lambda site: (site.op == "dot", site.op != "take"))
    return {site.path: site for site in by_weight}


def stored_layout(q: QArray, site: SitePlan, backend: str, packed: bool = False) -> Layout:
    """The layout in which `backend` reads a parameter, for the site that decides it."""
    assert site.roles is not None
    contracted, stack = role_axes(site.roles)
    layout = layout_for(backend, q, contracted, stack)
    if site.op in ("conv", "ragged_dot"):
        # These read any order, and XLA lays kernels and experts out by itself.
        layout = Layout(wide=layout.wide)
    if not packed or not q.scheme.values.packs:
        return layout
    order = layout.permutation(q.ndim)
    last = order[-1]
    block = q.tile[last] if q.tile[last] > 1 else q.shape[last]
    if block % least_block(q.scheme.values) or q.shape[last] % block:
        return layout
    return dataclasses.replace(layout, packed=block, wide=False)
