"""What is told of how GPTQ went."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.algorithms import GPTQ
from jaxquant.algorithms._health import Health, told
from jaxquant.numerics import INT4
from jaxquant.qarray import Scheme, Tile


def health(**other):
    well = dict(weight_finite=True, gram_finite=True, damping=0.01, dead=0, solved=True)
    found = {name: np.asarray(x) for name, x in {**well, **other}.items()}
    return Health(**{**found, "damping": found["damping"].astype(np.float32)})


def test_of_what_went_well_nothing_is_told():
    assert told(health(), 0.01) == ()


@pytest.mark.parametrize(
    "other, note",
    [
        (dict(dead=3), "inputs that were always 0, rounded to nearest: 3"),
        (dict(damping=0.1), "was not positive definite with damping 0.01: damped by 0.1"),
        (dict(damping=np.inf), "no damping made the Gram matrix positive definite"),
        (dict(solved=False), "too near to singular to make up for earlier levels"),
        (dict(damping=[0.01, 0.1]), "the Gram matrix at 1 of the stack was not"),
    ],
)
def test_what_did_not_is(other, note):
    given = dict(weight_finite=[True] * 2, gram_finite=[True] * 2, dead=[0] * 2, solved=[True] * 2)
    stacked = given if isinstance(other.get("damping"), list) else {}
    (found,) = told(health(**{**stacked, **other}), 0.01)
    assert note in found


@pytest.mark.parametrize("what", ["weight", "gram"])
def test_numbers_that_are_not_finite_are_errors(what):
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        told(health(**{f"{what}_finite": False}), 0.01)


def test_a_correction_that_could_not_be_computed_is_told_of():
    scheme = Scheme(values=INT4, tile=Tile(contracted=4))
    # One direction, and rounding that makes it indefinite.
    gram = jnp.full((8, 8), 1e8) - 1e6 * jnp.eye(8)
    made = GPTQ(correction=0.5, damping=1e-6).run(
        jnp.ones((4, 8)), {"gram": gram, "drift": jnp.ones((8, 8))}, scheme
    )
    assert any("make up for earlier levels" in note for note in made.notes)
