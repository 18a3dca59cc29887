"""Gradients in mode simulate: those of fake quantization written out, whatever is around it."""

import math

import jax
import jax.numpy as jnp
import nnx_models
import pytest
from flax import linen as nn, nnx
from linen_models import Case, CASES, D, Scanned, Tied
from quantized import same_bits
from simulated import (
    A8,
    assert_near,
    fake,
    faked,
    started,
    TENSOR4_UNSIGNED,
    unquantized,
    W4,
    W8,
    weighed,
)

import jaxquant as jq
from jaxquant.aot import hlo_facts
from jaxquant.intercept._placed import placed
from jaxquant.training import LSQ, Training

LEARNED = Training(weights=LSQ(), activations=LSQ())
LEARNED_WEIGHTS = Training(weights=LSQ())
IMAGES = jax.random.uniform(jax.random.key(3), (4, 6, 6, 3))


def _loss(apply, case, variables, params):
    return weighed(apply({**variables, "params": params}, *case.args, **case.options()))


class Joining(nn.Module):
    """Two projections that the model puts together before it multiplies."""

    @nn.compact
    def __call__(self, x):
        one, two = (
            self.param(name, nn.initializers.lecun_normal(), (D, 6)) for name in ("one", "two")
        )
        y = x @ jnp.concatenate([one, two], axis=1)
        return y[:, :6] * y[:, 6:]


class OwnRule(nn.Module):
    """A product under a derivative rule of the user's own, which doubles gradients."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (D, D))

        @jax.custom_vjp
        def product(x, w):
            return x @ w

        def backward(kept, g):
            x, w = kept
            return 2 * g @ w.T, 2 * x.T @ g

        product.defvjp(lambda x, w: (x @ w, (x, w)), backward)
        return nn.relu(product(nn.relu(x), w))


ELSEWHERE = {"elsewhere": "dequantize"}
MORE = [
    *((case, {}) for case in CASES if not case.options().get("capture_intermediates")),
    (Case(model=Joining()), {}),
    (Case(model=OwnRule()), ELSEWHERE),
]


@pytest.mark.parametrize("case, rule", MORE, ids=lambda v: str(v) if isinstance(v, Case) else "")
def test_gradients_are_those_of_fake_quantization(case, rule):
    """Written out: the plain model on what codes stand for, rounding passed straight through."""
    plan, tvariables = started(case, weights=W4, **rule)
    apply = jq.simulate(case.model, plan).apply
    params = tvariables["params"]
    got = jax.jit(jax.grad(lambda params: _loss(apply, case, tvariables, params)))(params)
    plain = unquantized(tvariables)

    def reference(params):
        return _loss(case.model.apply, case, plain, faked(fake, params, plan))

    want = jax.jit(jax.grad(reference))(params)
    assert any((x != 0).any() for x in jax.tree.leaves(want))
    assert_near(got, want, case.dtype)


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_gradients_of_eight_bits_are_near_those_of_the_float_model(case):
    plan, tvariables = started(case, weights=W8)
    plain = unquantized(tvariables)
    params = tvariables["params"]
    apply = jq.simulate(case.model, plan).apply
    got = jax.jit(jax.grad(lambda params: _loss(apply, case, tvariables, params)))(params)
    want = jax.jit(jax.grad(lambda params: _loss(case.model.apply, case, plain, params)))(params)
    both = [jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (got, want)]
    # A weight is off by at most half of 1/127 of its channel's peak; there are up to seven layers.
    assert jnp.linalg.norm(both[0] - both[1]) < 7 / 127 * jnp.linalg.norm(both[1])


def learned_fake(x, scale, format, count):
    """LSQ as its authors print it (appendix B): `grad_scale`, `round_pass`, clip, multiply."""
    factor = 1 / math.sqrt(count * format.highest)
    scale = scale * factor + jax.lax.stop_gradient(scale * (1 - factor))
    u = jnp.clip(x / scale, format.lowest, format.highest)
    return (u + jax.lax.stop_gradient(jnp.round(u) - u)) * scale


def test_learned_scales_have_the_gradients_of_the_paper():
    """A convolution and a dense layer, both sides learned, against the paper's own listing."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, seen=lambda name, x: x):
            # Smooth: sums of codes are exactly 0 where those of floats are nearly, and a ReLU
            # tells the two apart.
            x = nn.softplus(nn.Conv(8, (3, 3), use_bias=False, name="conv")(seen("conv", x)))
            return nn.Dense(5, name="dense")(seen("dense", x.reshape(x.shape[0], -1)))

    model = Two()
    variables = model.init(jax.random.key(0), IMAGES)
    rule = jq.Rule(
        match="*", weights=W4, activations=TENSOR4_UNSIGNED, static=True, training=LEARNED
    )
    plan = jq.plan(model, variables, IMAGES, recipe=jq.Recipe(name="r", rules=(rule,)))
    tvariables = jq.start_training(model, variables, plan, [(IMAGES,)])
    features = {"conv": math.prod(IMAGES.shape[1:]), "dense": 8 * 36}

    def reference(tvariables):
        own = tvariables["jaxquant"]

        def weight(leaf, w):
            scale, each = own["weights"][leaf.path]["scale"], w.size // w.shape[-1]
            return learned_fake(w, scale, jq.INT4, each)

        def seen(name, x):
            (found,) = (s for site, s in own["sites"].items() if site.startswith(name))
            return learned_fake(x, found["scale"][0], jq.formats.UINT4, features[name])

        params = faked(weight, tvariables["params"], plan)
        return jnp.square(model.apply({"params": params}, IMAGES, seen)).sum()

    def loss(tvariables):
        return jnp.square(jq.simulate(model, plan).apply(tvariables, IMAGES)).sum()

    got, want = (jax.jit(jax.grad(f))(tvariables) for f in (loss, reference))

    # The sums are of at most 288 products, over 4 x 36 windows; gradients of scales add all of it.
    def compare(a, b):
        assert jnp.abs(a - b).max() <= 2 * 288 * 2.0**-24 * 144 * max(1.0, float(jnp.abs(b).max()))

    jax.tree.map(compare, got, want)


def _mesh():
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((4,), ("data",), axis_types=auto)


@pytest.mark.parametrize("shard", ["rows", "weights"])
def test_four_devices_have_the_gradients_of_one(shard):
    case = Case(model=Scanned(), args=(jax.random.normal(jax.random.key(7), (8, D)),))
    plan, tvariables = started(case, weights=W4, activations=A8)
    apply = jq.simulate(case.model, plan).apply

    @jax.jit
    def gradient(tvariables, x):
        return jax.grad(
            lambda v: _loss(apply, Case(model=case.model, args=(x,)), v, v["params"]),
        )(tvariables)

    (x,) = case.args
    want = gradient(tvariables, x)
    if shard == "rows":
        x = jax.device_put(x, jax.NamedSharding(_mesh(), jax.P("data")))
    else:
        where = jax.NamedSharding(_mesh(), jax.P(None, None, "data"))
        params = jax.tree.map(
            lambda w: jax.device_put(w, where) if w.ndim == 3 else w, tvariables["params"]
        )
        tvariables = {**tvariables, "params": params}
    assert_near(gradient(tvariables, x), want)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("training", [Training(), LEARNED_WEIGHTS])
def test_gathered_codes_have_the_gradients_of_one_device(axis, training):
    """Parameters cut over the devices that share the batch: codes travel, weights do not."""
    case = Case(model=Scanned(), args=(jax.random.normal(jax.random.key(7), (8, D)),))
    plan, tvariables = started(case, weights=W4, activations=A8, training=training)
    (x,) = case.args

    def gradient(plan, **options):
        apply = jq.simulate(case.model, plan, **options).apply
        return jax.jit(jax.value_and_grad(lambda v, x: weighed(apply(v, x))))

    want = gradient(plan)(tvariables, x)
    mesh = _mesh()
    cut = jax.NamedSharding(mesh, jax.P(None, *("data" if a == axis else None for a in (1, 2))))
    plan = placed(plan, {leaf.path: cut for leaf in plan.leaves})
    params = jax.tree.map(
        lambda w: jax.device_put(w, cut) if w.ndim == 3 else w, tvariables["params"]
    )
    moved = {**tvariables, "params": params}
    x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    step = gradient(plan, gather="data")
    assert_near(step(moved, x), want)
    exchanged = hlo_facts(step.lower(moved, x).compile().as_text()).collectives
    gathers = [shape for each in exchanged if each.kind == "all-gather" for shape in each.shapes]
    assert any(shape.startswith(("s4[", "s8[")) for shape in gathers)
    assert not [s for s in gathers if s.startswith(("f32", "bf16")) and _values(s) >= D * D]


def _values(shape: str) -> int:
    return math.prod(int(d) for d in shape.partition("[")[2].rstrip("]").split(",") if d)


def test_examples_one_by_one_have_the_gradient_of_all():
    """`vmap` of the gradient, ranges of each row its own: examples do not see each other."""
    case = Case(model=Scanned())
    plan, tvariables = started(case, weights=W4, activations=A8)
    apply = jq.simulate(case.model, plan).apply

    def gradient(v, x):
        return jax.grad(lambda v: jnp.square(apply(v, x)).sum())(v)

    (x,) = case.args
    each = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(tvariables, x[:, None])
    assert_near(jax.tree.map(lambda g: g.sum(0), each), jax.jit(gradient)(tvariables, x))


def test_two_parts_of_a_batch_add_up_to_it():
    """Gradient accumulation by `scan`."""
    case = Case(model=Scanned())
    plan, tvariables = started(case, weights=W4, activations=A8)
    apply = jq.simulate(case.model, plan).apply

    def gradient(v, x):
        return jax.grad(lambda v: jnp.square(apply(v, x)).sum())(v)

    @jax.jit
    def accumulated(v, x):
        zeros = jax.tree.map(jnp.zeros_like, v)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(v, part)), None

        return jax.lax.scan(add, zeros, x.reshape(2, -1, D))[0]

    (x,) = case.args
    assert_near(accumulated(tvariables, x), jax.jit(gradient)(tvariables, x))


def test_both_uses_of_a_tied_embedding_reach_it():
    case = Case(model=Tied(), args=(jnp.array([[1, 2]]),))
    plan, tvariables = started(case, weights=W4)
    apply = jq.simulate(case.model, plan).apply
    gradient = jax.grad(lambda params: _loss(apply, case, tvariables, params))(tvariables["params"])
    rows = gradient["embed"]["embedding"]
    # The logits' product reaches every row; the lookup adds to the two that were read.
    assert (rows != 0).any(axis=1).all()


X = jax.random.normal(jax.random.key(5), (4, nnx_models.D))
IDS = jnp.array([[1, 2, 10], [0, 5, 1]])
MODELS = {nnx_models.MLP: X, nnx_models.Tied: IDS, nnx_models.Listed: X, nnx_models.Scanned: X}


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_nnx_models_keep_both_laws(kind):
    """Their forward to the bit, and their gradients."""
    x, model = MODELS[kind], kind(nnx.Rngs(params=0, dropout=1))
    state = nnx.state(model)

    def simulated(**schemes):
        rule = jq.Rule(match="*", **schemes)
        plan = jq.plan(model, state, x, recipe=jq.Recipe(name="r", rules=(rule,)))
        return plan, jq.simulate(model, plan, jq.start_training(model, state, plan))

    plan, tmodel = simulated(weights=W4, activations=A8)
    qvariables = jq.convert(tmodel.variables, plan)
    converted = jax.jit(jq.wrap(model, plan, qvariables).apply)(qvariables, x)
    assert same_bits(jax.jit(tmodel.apply)(tmodel.variables, x), converted)
    plan, tmodel = simulated(weights=W4)
    found = nnx.grad(lambda m: weighed(m(x)), argnums=nnx.DiffState(0, tmodel.wrt))(tmodel)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def reference(params):
        return weighed(nnx.merge(graphdef, faked(fake, params, plan), rest, copy=True)(x))

    want = jax.grad(reference)(params)
    assert_near(nnx.to_pure_dict(found)["model"], nnx.to_pure_dict(want))
