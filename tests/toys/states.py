"""Quantized trees whose weights were scaled and put in another order, and the state that undoes it.

Smoothing is by powers of two, so that nothing is rounded by it.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from exact import LOWEST

import jaxquant as jq
from jaxquant.intercept import stamped
from jaxquant.intercept._variables import map_leaves, states_of, unstamped

COLUMNS = jq.Scheme(values=jq.INT8, tile=jq.Tile(contracted=1, kept=None), range=LOWEST)
"""A scale for each input: that of a column that is scaled is scaled alike."""
COLUMNS_A16 = jq.Recipe(name="columns", rules=(jq.Rule(match="*", weights=COLUMNS),))


def state(plan, names=("smoothing", "permutation"), seed=0):
    """Smoothing and permutation of every dot whose parameter has no other uses, by site."""
    rng = np.random.default_rng(seed)
    states = {}
    for leaf in plan.leaves:
        sites = [s for s in plan.sites if s.path == leaf.path and s.weights is not None]
        if any(site.op != "dot" for site in sites):
            continue
        stack = [leaf.shape[a] for a in leaf.stack]
        k = int(np.prod([leaf.shape[a] for a in leaf.contracted]))
        own = {
            "smoothing": np.float32(2.0) ** rng.integers(-3, 4, (*stack, k)),
            "permutation": rng.permuted(np.broadcast_to(np.arange(k), (*stack, k)), axis=-1),
        }
        own = {name: jnp.asarray(own[name]) for name in names}
        states |= {site.site: own for site in sites}
    return states


def undone(variables, plan, states):
    """The variables with what `states` undo done to their weights."""

    def one(path, w):
        leaf = plan.by_path.get(path)
        own = next((own for site, own in states.items() if site.rpartition("#")[0] == path), None)
        if leaf is None or own is None:
            return w
        kept = [a for a in range(w.ndim) if a not in leaf.contracted and a not in leaf.stack]
        order = [*leaf.stack, *kept, *leaf.contracted]
        moved = np.asarray(w.astype(jnp.float32)).transpose(order)
        shape, lead = moved.shape, len(leaf.stack)
        k = int(np.prod(shape[lead + len(kept) :]))
        m = moved.reshape(*shape[:lead], -1, k)
        if "smoothing" in own:
            m = m * np.asarray(own["smoothing"])[..., None, :]
        if "permutation" in own:
            index = np.asarray(own["permutation"])[..., None, :]
            m = np.take_along_axis(m, np.broadcast_to(index, m.shape), axis=-1)
        return jnp.asarray(m.reshape(shape).transpose(np.argsort(order))).astype(w.dtype)

    return map_leaves(one, variables)


def quantized(variables, plan, states):
    """Quantized to nearest as `plan` says, with state, whatever data it needs."""
    bare = [dataclasses.replace(s, static=False, scaling=None, outliers=None) for s in plan.sites]
    bare = [dataclasses.replace(s, algorithm=None) for s in bare]
    tree = jq.quantize(variables, dataclasses.replace(plan, sites=tuple(bare)))
    return stamped(unstamped(tree)[0], plan.fingerprint, states)


def with_state(variables, plan, **options):
    """A quantized tree that computes what one without state does."""
    states = state(plan, **options)
    tree = quantized(undone(variables, plan, states), plan, states)
    assert set(states_of(tree)) == set(states)
    return tree
