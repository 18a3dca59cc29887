"""Weights as matrices, and QArrays from their parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.algorithms import as_matrix, assemble, from_matrix, held_values, matrix_tile
from jaxquant.numerics import as_bytes, INT4, MinMax, UINT4
from jaxquant.qarray import quantize_array, Scheme, schemes, Tile

ASYMMETRIC = Scheme(
    values=UINT4,
    tile=Tile(contracted=4),
    range=MinMax(),
    zero_point=UINT4,
    scale=jq.formats.FLOAT16,
)
BLOCKS = Scheme(values=jq.formats.E4M3, tile=Tile(contracted=4, kept=3))
RAGGED = Scheme(values=INT4, tile=Tile(contracted=5, kept=4, ragged=True))
CENTERED = Scheme(values=INT4, tile=Tile(contracted=4), centered=True)

ROLES = {
    "rows then columns": ((6, 8), (1,), ()),
    "columns then rows": ((8, 6), (0,), ()),
    "stack first": ((2, 8, 6), (1,), (0,)),
    "stack in between": ((8, 2, 6), (0,), (1,)),
    "stack last": ((6, 8, 2), (1,), (2,)),
    "two stacks": ((2, 8, 3, 6), (1,), (0, 2)),
    "two contracted axes": ((2, 4, 6), (0, 1), ()),
    "contracted axes apart": ((2, 6, 4), (0, 2), ()),
    "two kept axes": ((8, 2, 3), (0,), ()),
    "kept axes apart, a stack": ((2, 8, 5, 3), (1,), (2,)),
}
SCHEMES = {
    "int8_channel": schemes.INT8_CHANNEL,
    "g4 asymmetric": ASYMMETRIC,
    "blocks": BLOCKS,
    "centered": CENTERED,
    "ternary": schemes.TERNARY,
    "nested": Scheme(
        values=jq.formats.E2M1,
        tile=Tile(contracted=4),
        scale=Scheme(values=jq.formats.E4M3, tile=jq.qarray.PER_TENSOR),
    ),
    "nested and centered": Scheme(
        values=jq.formats.NF4,
        tile=Tile(contracted=4),
        scale=Scheme(
            values=jq.formats.DYNAMIC8,
            tile=Tile(contracted=None, kept=3, ragged=True),
            centered=True,
        ),
    ),
}


def _parts(q, roles):
    """A QArray's parts in matrix form."""
    if q is None or isinstance(q, jax.Array):
        return None if q is None else as_matrix(q, **roles)
    held = {name: _parts(getattr(q, name), roles) for name in ("scale", "zero_point", "offset")}
    codes = as_bytes(as_matrix(q.codes, **roles))
    return jq.QArray(codes=codes, **held, scheme=q.scheme, layout=q.layout, dtype=q.dtype)


def _assembled(w, scheme, contracted, stack):
    roles = {"contracted": contracted, "stack": stack}
    q = quantize_array(w, scheme, **roles)
    parts = _parts(q, roles)
    made = assemble(
        parts.codes,
        parts.scale,
        parts.zero_point,
        offset=parts.offset,
        shape=w.shape,
        dtype=w.dtype,
        scheme=scheme,
        **roles,
    )
    return q, made


def _assert_same(q, made):
    assert jax.tree.structure(q) == jax.tree.structure(made)
    for wanted, got in zip(jax.tree.leaves(q), jax.tree.leaves(made), strict=True):
        assert wanted.dtype == got.dtype
        np.testing.assert_array_equal(as_bytes(wanted), as_bytes(got))


@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_in_matrix_form_assemble_to_what_quantize_array_makes(scheme, roles):
    shape, contracted, stack = ROLES[roles]
    w = jax.random.normal(jax.random.key(0), shape)
    try:
        q, made = _assembled(w, SCHEMES[scheme], contracted, stack)
    except ValueError as error:
        # Tiles of several kept axes that end at each of them are no row of tiles.
        assert "no row of tiles" in str(error) or "do not fill" in str(error)  # noqa: PT017
        assert roles in ("two kept axes", "kept axes apart, a stack")  # noqa: PT017
        return
    _assert_same(q, made)


@pytest.mark.parametrize("shape", [(6, 8), (7, 13), (4, 5), (3, 4)])
def test_ragged_tiles_assemble(shape):
    q, made = _assembled(jax.random.normal(jax.random.key(1), shape), RAGGED, (1,), ())
    _assert_same(q, made)


def test_a_ragged_axis_behind_another_of_its_role_is_an_error():
    with pytest.raises(ValueError, match="end raggedly at axis 1"):
        matrix_tile((3, 7, 4), RAGGED, contracted=(0, 1))
    # In front of it, a short tile is the last one.
    assert matrix_tile((7, 5, 4), RAGGED, contracted=(0, 1)) == (4, 5)


@pytest.mark.parametrize("roles", ROLES)
def test_matrices_come_back(roles):
    shape, contracted, stack = ROLES[roles]
    w = jnp.arange(float(np.prod(shape))).reshape(shape)
    m = as_matrix(w, contracted=contracted, stack=stack)
    assert m.shape[: len(stack)] == tuple(shape[a] for a in stack)
    assert m.shape[-1] == np.prod([shape[a] for a in contracted])
    np.testing.assert_array_equal(from_matrix(m, shape, contracted=contracted, stack=stack), w)


def test_a_matrix_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="is not one of an array of shape"):
        from_matrix(jnp.zeros((3, 4)), (4, 4), contracted=(0,))


@pytest.mark.parametrize("roles", ROLES)
def test_state_is_taken_back_from_what_codes_stand_for(roles):
    shape, contracted, stack = ROLES[roles]
    rng = np.random.default_rng(0)
    axes = {"contracted": contracted, "stack": stack}
    m = as_matrix(jnp.asarray(rng.standard_normal(shape), jnp.float32), **axes)
    stored = np.broadcast_to(np.arange(m.shape[-1]), (*m.shape[:-2], m.shape[-1]))
    order = jnp.asarray(rng.permuted(stored, axis=-1))
    factors = jnp.exp2(jnp.asarray(rng.integers(-2, 3, order.shape), jnp.float32))
    held = jnp.take_along_axis(m, order[..., None, :], axis=-1) * factors[..., None, :]
    q = quantize_array(from_matrix(held, shape, **axes), schemes.INT8_CHANNEL, **axes)
    got = held_values(q, {"permutation": order, "smoothing": factors}, **axes)
    # Half a step of what was held: up to 4 times as large, and divided by as little as 1/4.
    np.testing.assert_allclose(got, m, atol=float(jnp.abs(m).max()) * 16 / 254)
