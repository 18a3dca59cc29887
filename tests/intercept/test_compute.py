"""What sites compute: convolutions, ragged products and experts, found in models by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, dequantized, inputs, W8, W8A8, W8A16, weight, wrapped
from flax import linen as nn, nnx
from jax import lax

import jaxquant as jq
from jaxquant.ops import conv_general_dilated, ragged_dot

NHWC = ("NHWC", "HWIO", "NHWC")


def _abstract(tree):
    return jax.eval_shape(lambda: tree)


def _plan(model, variables, x, recipe=W8A16):
    """From shapes alone."""
    return jq.plan(model, _abstract(variables), _abstract(x), recipe=recipe)


def _filled(model, x):
    """Variables of a model whose kernels int8 holds exactly; other parameters are small."""

    def fill(path, leaf):
        if path[-1].key != "kernel":
            return inputs(*leaf.shape)
        return weight(*leaf.shape, contracted=tuple(range(leaf.ndim - 1)))

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(fill, shapes)


CONVS = {
    "1-D": (nn.Conv(6, (3,)), (2, 7, 4)),
    "2-D": (nn.Conv(6, (3, 2), strides=(2, 1)), (2, 6, 5, 4)),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2), (2, 6, 5, 4)),
    "depthwise": (nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False), (2, 6, 5, 4)),
    "dilated": (nn.Conv(6, (2, 2), kernel_dilation=(2, 1), padding="VALID"), (2, 6, 5, 4)),
    "upsampled": (nn.Conv(6, (3, 3), input_dilation=2, padding=((1, 1), (2, 0))), (2, 3, 3, 4)),
    "circular": (nn.Conv(6, (3,), padding="CIRCULAR"), (2, 7, 4)),
    "causal": (nn.Conv(6, (3,), padding="CAUSAL"), (2, 7, 4)),
    "no batch": (nn.Conv(6, (3,)), (7, 4)),
    "several batches": (nn.Conv(6, (3,)), (2, 3, 7, 4)),
    "transposed": (nn.ConvTranspose(6, (3, 3), strides=(2, 2)), (2, 3, 3, 4)),
}


@pytest.mark.parametrize("model, shape", CONVS.values(), ids=CONVS)
def test_linen_convolutions(model, shape):
    """Sums of whole numbers below 2^24, scaled by 1: equal to the bit."""
    x = inputs(*shape)
    variables = _filled(model, x)
    plan = _plan(model, variables, x)
    site = plan.by_site["kernel#conv"]
    assert site.roles == ("contracted",) * (len(site.shape) - 1) + ("kept",)
    qvariables = jq.quantize(variables, plan)
    q = qvariables["params"]["kernel"]
    assert q.codes.dtype == jnp.int8 and q.scale.size == site.shape[-1]
    got = jax.jit(wrapped(model, plan).apply)(qvariables, x)
    np.testing.assert_array_equal(got, model.apply(variables, x))


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_images_are_rounded_one_by_one(backend: str):
    model = nn.Conv(6, (3, 3), padding="VALID", use_bias=False)
    x = inputs(3, 6, 5, 4) / 3 * jnp.asarray([1.0, 8.0, 64.0])[:, None, None, None]
    variables = {"params": {"kernel": weight(3, 3, 4, 6, contracted=(0, 1, 2))}}
    plan = _plan(model, variables, x, W8A8)
    qvariables = jq.quantize(variables, plan)
    rounded = jq.quantize_activation(x, W8, contracted=(1, 2, 3))
    assert rounded.scale.shape == (3, 1, 1, 1)
    q = qvariables["params"]["kernel"]
    want = conv_general_dilated(
        rounded, q, (1, 1), "VALID", dimension_numbers=NHWC, backend=backend
    )
    got = jq.wrap(model, plan, backend=backend).apply(qvariables, x)
    np.testing.assert_array_equal(got, want)


def test_images_whose_windows_would_need_several_scales_are_an_error_of_the_plan():
    model = nn.Conv(6, (3,))
    x = inputs(2, 8, 4)
    grouped = jq.Scheme(values=jq.INT8, tile=jq.Tile(contracted=4))
    rule = jq.Rule(match="*", weights=W8, activations=grouped)
    with pytest.raises(jq.PlanError, match="kernel#conv cannot be rounded as int8 g4: the windows"):
        _plan(model, _filled(model, x), x, jq.Recipe(name="r", rules=(rule,)))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return jnp.clip(x + nn.Conv(4, (3,))(x), -4.0, 4.0), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Residual),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers(name="layers")(x, None)[0]


def test_convolutions_in_scan_and_remat():
    model, x = Scanned(), inputs(2, 7, 4)
    kernel = weight(3, 3, 4, 4, contracted=(1, 2))
    variables = {"params": {"layers": {"Conv_0": {"kernel": kernel, "bias": inputs(3, 4)}}}}
    plan = _plan(model, variables, x)
    site = plan.by_site["layers/Conv_0/kernel#conv"]
    assert site.roles == ("stack", "contracted", "contracted", "kept")
    qvariables = jq.quantize(variables, plan)
    got = jax.jit(wrapped(model, plan).apply)(qvariables, x)
    np.testing.assert_array_equal(got, model.apply(variables, x))

    def loss(apply, variables):
        return jax.jit(jax.grad(lambda x: apply(variables, x).sum()))(x)

    np.testing.assert_array_equal(
        loss(wrapped(model, plan).apply, qvariables), loss(model.apply, variables)
    )


@pytest.mark.parametrize("images, role", [(0, "stack"), (None, "kept")])
def test_convolutions_under_vmap(images, role: str):
    """With images of its own each kernel is in a group of its own; with shared ones, they join."""
    model = nn.vmap(
        nn.Conv,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=images,
        axis_size=3,
    )(5, (3,))
    x = inputs(*(3, 2, 7, 4)[images is None :])
    kernel = weight(3, 3, 4, 5, contracted=(1, 2))
    variables = {"params": {"kernel": kernel, "bias": inputs(3, 5)}}
    plan = _plan(model, variables, x)
    assert plan.by_site["kernel#conv"].roles == (role, "contracted", "contracted", "kept")
    qvariables = jq.quantize(variables, plan)
    got = jax.jit(wrapped(model, plan).apply)(qvariables, x)
    np.testing.assert_array_equal(got, model.apply(variables, x))


class Images(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(4, 6, (3, 3), strides=(2, 1), rngs=rngs)
        self.deep = nnx.Conv(6, 12, (3, 3), feature_group_count=6, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        return self.out(self.deep(nnx.relu(self.conv(x))).mean(axis=(1, 2)))


@pytest.mark.parametrize("recipe", [W8A16, W8A8], ids=str)
def test_nnx_convolutions(recipe):
    model, x = Images(nnx.Rngs(0)), inputs(2, 6, 5, 4)
    variables = nnx.state(model)
    plan = _plan(model, variables, x, recipe)
    assert {"conv/kernel#conv", "deep/kernel#conv", "out/kernel#dot"} == set(plan.by_site)
    qvariables = jq.quantize(variables, plan)
    qmodel = jq.wrap(model, plan, qvariables)
    got, want = nnx.jit(lambda m, x: m(x))(qmodel, x), model(x)
    # Each of three layers is wrong by half of a 127th of its weights' peaks, and of its inputs',
    # in each of its 36, 9 or 12 products; the errors have either sign.
    assert got.shape == want.shape
    assert 0 < float(jnp.abs(got - want).max()) < 3 / 127 * 6 * float(jnp.abs(want).max())


def _conv(x, w, **keywords):
    return lax.conv_general_dilated(x, w, (1,), "SAME", **keywords)


def test_a_weight_that_is_convolved_is_refused_with_the_reason():
    model = Applied(lambda x, w: _conv(w, x), (2, 4, 7))
    variables = {"params": {"w": weight(2, 4, 7)}}
    with pytest.raises(jq.PlanError, match="w#conv cannot be quantized: the weight is what is con"):
        _plan(model, variables, inputs(6, 4, 3))


def test_a_transposed_kernel_keeps_the_roles_of_its_axes():
    """Stored [out, width, in], used as [out, in, width]."""
    model = Applied(lambda x, w: _conv(x, w.transpose(0, 2, 1)), (6, 3, 4))
    variables, x = {"params": {"w": weight(6, 3, 4, contracted=(1, 2))}}, inputs(2, 4, 7)
    plan = _plan(model, variables, x)
    assert plan.by_site["w#conv"].roles == ("kept", "contracted", "contracted")
    got = wrapped(model, plan).apply(jq.quantize(variables, plan), x)
    np.testing.assert_array_equal(got, model.apply(variables, x))


SIZES = jnp.asarray([3, 0, 4], jnp.int32)


def _ragged(x, w):
    return lax.ragged_dot(x, w, SIZES)


RAGGED = {
    "[E, K, N]": (_ragged, (3, 8, 5), ("batch", "contracted", "kept")),
    "[E, N, K]": (lambda x, w: _ragged(x, w.swapaxes(1, 2)), (3, 5, 8), None),
    "[K, E, N]": (lambda x, w: _ragged(x, w.swapaxes(0, 1)), (8, 3, 5), None),
    "layers": (lambda x, w: _ragged(x, w[1]), (2, 3, 8, 5), None),
    "half": (lambda x, w: _ragged(x, w.astype(jnp.bfloat16).astype(x.dtype)), (3, 8, 5), None),
}
ROLES = {"[E, N, K]": (0, 2, 1), "[K, E, N]": (1, 0, 2)}


@pytest.mark.parametrize("name", RAGGED)
def test_experts_of_a_ragged_product(name: str):
    function, shape, roles = RAGGED[name]
    contracted = {"[E, N, K]": 2, "[K, E, N]": 0, "layers": 2}.get(name, 1)
    model, x = Applied(function, shape), inputs(9, 8)
    variables = {"params": {"w": weight(*shape, contracted=(contracted,))}}
    plan = _plan(model, variables, x)
    site = plan.by_site["w#ragged_dot"]
    assert site.roles is not None and site.roles[contracted] == "contracted"
    assert roles is None or site.roles == roles
    if name in ROLES:
        assert site.roles == tuple(
            ("batch", "contracted", "kept")[a] for a in np.argsort(ROLES[name])
        )
    qvariables = jq.quantize(variables, plan)
    want = model.apply(variables, x)
    for run in (wrapped(model, plan), jq.wrap(model, plan)):
        got = jax.jit(run.apply)(jq.prepare(qvariables, plan), x)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_rows_of_a_ragged_product_are_rounded_one_by_one(backend: str):
    model, x = Applied(_ragged, (3, 8, 5)), inputs(9, 8) / 3
    variables = {"params": {"w": weight(3, 8, 5, contracted=(1,))}}
    plan = _plan(model, variables, x, W8A8)
    qvariables = jq.quantize(variables, plan)
    rounded = jq.quantize_activation(x, W8, contracted=(1,))
    want = ragged_dot(rounded, qvariables["params"]["w"], SIZES, backend=backend)
    got = jq.wrap(model, plan, backend=backend).apply(qvariables, x)
    np.testing.assert_array_equal(got, want)


def _general(x, w, contracted, groups, ragged=(0,), batch=((), ())):
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracted, batch),
        lhs_ragged_dimensions=ragged,
        rhs_group_dimensions=groups,
    )
    return lax.ragged_dot_general(x, w, SIZES, numbers)


def test_other_orders_of_a_ragged_product_are_computed():
    def function(x, w):
        return _general(x, w, ((1,), (2,)), (0,))

    model, x = Applied(function, (3, 5, 8)), inputs(9, 8)
    variables = {"params": {"w": weight(3, 5, 8, contracted=(2,))}}
    plan = _plan(model, variables, x)
    assert plan.by_site["w#ragged_dot"].roles == ("batch", "kept", "contracted")
    got = wrapped(model, plan).apply(jq.quantize(variables, plan), x)
    np.testing.assert_array_equal(got, model.apply(variables, x))


def _batched(x, w):
    return jax.vmap(lax.ragged_dot)(jnp.stack([x, x]), w, jnp.stack([SIZES, SIZES]))


REFUSED = {
    "summed rows": (
        lambda x, w: _general(x, w, ((0,), (0,)), ()),
        (9, 5),
        "as rows by experts only",
    ),
    "batch": (_batched, (2, 3, 8, 5), "without batch axes"),
    "own rows": (lambda x, w: _ragged(w, x[:3].reshape(3, 8, 1)), (9, 8), "own rows are dealt out"),
}


@pytest.mark.parametrize("function, shape, message", REFUSED.values(), ids=REFUSED)
def test_other_kinds_of_ragged_products_are_refused_with_the_reason(function, shape, message):
    model = Applied(function, shape)
    variables, x = {"params": {"w": weight(*shape)}}, inputs(9, 8)
    with pytest.raises(jq.PlanError, match=f"w#ragged_dot cannot be quantized: .*{message}"):
        _plan(model, variables, x)
    left = jq.Recipe(name="left", rules=(jq.Rule(match="*"),))
    plan = _plan(model, variables, x, left)
    got = jq.wrap(model, plan).apply(jq.quantize(variables, plan), x)
    np.testing.assert_array_equal(got, model.apply(variables, x))


@jax.custom_vjp
def _clipped(x, w):
    return _ragged(x, w)


def _clipped_forward(x, w):
    return _ragged(x, w), (x, w)


def _clipped_backward(kept, outer):
    x, w = kept
    _, pull = jax.vjp(_ragged, x, w)
    return tuple(jnp.clip(g, -50.0, 50.0) for g in pull(outer))


_clipped.defvjp(_clipped_forward, _clipped_backward)


def test_a_users_derivative_rule_reads_experts_too():
    model, x = Applied(_clipped, (3, 8, 5)), inputs(9, 8)
    variables = {"params": {"w": weight(3, 8, 5, contracted=(1,))}}
    plan = _plan(model, variables, x)
    qvariables = jq.quantize(variables, plan)

    def gradient(apply, variables):
        return jax.jit(jax.grad(lambda x: apply(variables, x).sum()))(x)

    got = gradient(wrapped(model, plan).apply, qvariables)
    np.testing.assert_array_equal(got, gradient(model.apply, variables))
    assert float(jnp.abs(got).max()) == 50.0


def test_dense_experts_are_a_batch_of_products():
    """`[E, K, N]` in an einsum: every expert sees every token, or its own."""
    for subscripts, shape, roles in (
        ("tk,ekn->etn", (4, 8), ("kept", "contracted", "kept")),
        ("etk,ekn->etn", (3, 4, 8), ("batch", "contracted", "kept")),
    ):
        model = Applied(lambda x, w, s=subscripts: jnp.einsum(s, x, w), (3, 8, 5))
        variables, x = {"params": {"w": weight(3, 8, 5, contracted=(1,))}}, inputs(*shape)
        plan = _plan(model, variables, x)
        assert plan.by_site["w#dot"].roles == roles
        qvariables = jq.quantize(variables, plan)
        assert qvariables["params"]["w"].scale.shape == (3, 1, 5)
        got = wrapped(model, plan).apply(qvariables, x)
        np.testing.assert_array_equal(got, model.apply(variables, x))


@pytest.mark.parametrize("subscripts", ["bk,kn,bn->bn", "kn,bk,bn->bn", "bk,bn,kn->bn"])
def test_the_pair_that_holds_the_weight_of_three_operands(subscripts: str):
    def function(x, w):
        gate = x[:, :5] + 1
        others = {"bk": x, "kn": w, "bn": gate}
        return jnp.einsum(subscripts, *(others[p] for p in subscripts[:-4].split(",")))

    model, x = Applied(function, (8, 5)), inputs(4, 8)
    variables = {"params": {"w": weight(8, 5, contracted=(0,))}}
    plan = _plan(model, variables, x)
    assert plan.by_site["w#dot"].roles == ("contracted", "kept")
    got = wrapped(model, plan).apply(jq.quantize(variables, plan), x)
    np.testing.assert_array_equal(got, model.apply(variables, x))


def test_a_convolution_is_observed_by_its_windows():
    model = nn.Sequential([nn.Conv(4, (3,)), nn.Dense(5)])
    x = inputs(2, 7, 4)
    stats = jq.observe(model, _filled(model, x), [(x,)])
    assert set(stats) == {"layers_0/kernel#conv", "layers_1/kernel#dot"}
    assert stats["layers_0/kernel#conv"]["peak"].shape == (3 * 4,)


def test_what_is_prepared_is_computed_alike():
    """Sub-byte kernels lie one a byte for a CPU, and packed where that is asked for."""
    model, x = nn.Conv(6, (3, 3), use_bias=False), inputs(2, 6, 5, 4)
    scheme = jq.Scheme(values=jq.INT4, tile=jq.PER_CHANNEL)
    recipe = jq.Recipe(name="r", rules=(jq.Rule(match="*", weights=scheme),))
    variables = model.init(jax.random.key(0), x)
    plan = _plan(model, variables, x, recipe)
    qvariables = jq.quantize(variables, plan)
    run = jax.jit(jq.wrap(model, plan).apply)
    want = run(qvariables, x)
    wide = jq.prepare(qvariables, plan, backend="xla_cpu")
    packed = jq.prepare(qvariables, plan, packed=True)
    assert wide["params"]["kernel"].codes.dtype == jnp.int8
    assert packed["params"]["kernel"].codes.shape == (3, 3, 4, 3)
    for prepared in (wide, packed, jq.prepare(qvariables, plan, backend="xla")):
        np.testing.assert_array_equal(run(prepared, x), want)
    np.testing.assert_allclose(
        want,
        model.apply(dequantized(qvariables), x),
        # 36 products, and a scale.
        atol=40 * 2.0**-24 * 36 * 4 * float(jnp.abs(variables["params"]["kernel"]).max()),
    )
