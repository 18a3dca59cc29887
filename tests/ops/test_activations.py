import jax
import jax.numpy as jnp
import pytest
from quantized import normal, same_bits, SCHEMES

from jaxquant.ops import dot, quantize_activation, quantize_static
from jaxquant.qarray import quantize_array

INT8 = SCHEMES["int8 channel"]


@pytest.mark.parametrize("name", ["int8 channel", "int8 tensor", "e4m3 channel", "int4 zero g64"])
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_it_is_the_quantization_of_the_array(name: str, run):
    x = normal(3, 5, 128)
    roles = dict(contracted=(-1,), stack=(0,))
    got = run(lambda x: quantize_activation(x, SCHEMES[name], **roles))(x)
    expected = quantize_array(x, SCHEMES[name], **roles)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert all(map(same_bits, jax.tree.leaves(got), jax.tree.leaves(expected)))


def test_tokens_have_their_own_scales_under_vmap_too():
    x = normal(4, 6, 128) * jnp.arange(1.0, 5.0)[:, None, None]
    whole = quantize_activation(x, INT8, contracted=(-1,))
    each = jax.vmap(lambda x: quantize_activation(x, INT8, contracted=(-1,)))(x)
    assert whole.scale.shape == (4, 6, 1)
    assert all(map(same_bits, jax.tree.leaves(whole), jax.tree.leaves(each)))


W = normal(128, 8)
DIFFERENTIATED = {
    "grad": lambda f, x: jax.grad(lambda x: f(x).sum())(x),
    "jit of grad": lambda f, x: jax.jit(jax.grad(lambda x: f(x).sum()))(x),
    "grad of jit": lambda f, x: jax.grad(lambda x: jax.jit(f)(x).sum())(x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "vjp of scan": lambda f, x: jax.vjp(
        lambda x: jax.lax.scan(lambda c, _: (c + f(x).sum(), None), 0.0, None, length=2)[0], x
    ),
    "remat": lambda f, x: jax.grad(lambda x: jax.checkpoint(f)(x).sum())(x),
    "vmap": lambda f, x: jax.vmap(jax.grad(lambda x: f(x).sum()))(x),
}


@pytest.mark.parametrize("how", DIFFERENTIATED)
def test_differentiating_it_is_an_error_that_names_mode_simulate(how: str):
    q = quantize_array(W, INT8, contracted=(0,))

    def f(x):
        return dot(quantize_activation(x, INT8, contracted=(-1,)), q)

    message = r"quantizes activations \(int8 channel\).*no useful gradient.*mode simulate"
    with pytest.raises(TypeError, match=message):
        DIFFERENTIATED[how](f, normal(5, 128))


def test_what_does_not_depend_on_it_may_be_differentiated():
    q = quantize_array(W, INT8, contracted=(0,))

    def loss(scale, x):
        return (scale * dot(quantize_activation(x, INT8, contracted=(-1,)), q)).sum()

    x = normal(5, 128)
    got = jax.grad(loss)(jnp.float32(2.0), x)
    assert got == pytest.approx(float(loss(jnp.float32(1.0), x)), rel=1e-5)


@pytest.mark.parametrize("name", ["int8 tensor", "e4m3 channel", "int4 zero g64"])
def test_scales_that_are_known_give_the_codes_that_finding_them_gives(name):
    x = normal(3, 5, 128)
    roles = dict(contracted=(-1,), stack=(0,))
    found = quantize_array(x, SCHEMES[name], **roles)
    got = quantize_static(x, SCHEMES[name], found.scale, found.zero_point, **roles)
    assert all(map(same_bits, jax.tree.leaves(got), jax.tree.leaves(found)))
    assert jax.tree.structure(got) == jax.tree.structure(found)


def test_it_is_not_differentiated_with_known_scales_either():
    q = quantize_array(normal(4, 128), INT8)
    with pytest.raises(TypeError, match="rounding has no useful gradient"):
        jax.grad(lambda x: dot(quantize_static(x, INT8, q.scale, contracted=(1,)), W).sum())(
            normal(4, 128)
        )
