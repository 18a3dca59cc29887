"""Checkpoint folders: what is saved is what is loaded, bit by bit, and damage is named."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn, nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from quantized_trees import (
    assert_same,
    bits,
    linen_tree,
    nnx_tree,
    plan_of,
    qarrays_of,
    some_qarray,
)

from jaxquant.algorithms import quantize
from jaxquant.checkpoint import CheckpointError, load, read_files, read_manifest, save
from jaxquant.intercept import plan as make_plan, stamped, wrap
from jaxquant.numerics import INT4
from jaxquant.qarray import (
    bytes_held,
    CANONICAL,
    is_qarray,
    Layout,
    relayout,
    Scheme,
    Tile,
)
from jaxquant.recipes import FP8, W4A16_G64_E8, W8A8

MESH = jax.make_mesh((4,), ("x",))

every_tree = pytest.mark.parametrize("make", [linen_tree, nnx_tree])


@every_tree
def test_what_is_loaded_is_what_was_saved(make, tmp_path):
    tree, plan = make()
    save(tmp_path / "out", tree, plan)
    loaded, loaded_plan = load(tmp_path / "out")
    assert_same(loaded, tree)
    assert loaded_plan == plan
    assert (loaded_plan.sites, loaded_plan.others) == (plan.sites, plan.others)


@every_tree
def test_what_is_loaded_on_every_device_is_what_was_saved(make, tmp_path):
    tree, plan = make()
    save(tmp_path, tree, plan)
    replicated = NamedSharding(MESH, P())
    loaded, _ = load(tmp_path, sharding=replicated)
    assert_same(loaded, tree)
    assert {len(x.devices()) for x in jax.tree.leaves(loaded)} == {4}


@every_tree
def test_a_template_gives_the_structure(make, tmp_path):
    tree, plan = make()
    save(tmp_path, tree, plan)
    assert_same(load(tmp_path, template=tree)[0], tree)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(32, 64, name="embed")
        x = nn.LayerNorm()(embed(tokens))
        return embed.attend(x + nn.Dense(64)(x))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 64, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(64, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + self.dropout(layer(x))
        return self.embed.attend(self.norm(x))


TOKENS = jnp.array([[3, 1, 4, 1, 5]])


@pytest.mark.parametrize("recipe", [W4A16_G64_E8, W8A8, FP8], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_loaded_model_gives_the_same_logits_bit_by_bit(kind, recipe, tmp_path):
    if kind == "linen":
        model = LinenModel()
        variables = model.init(jax.random.key(0), TOKENS)
    else:
        model = NNXModel(nnx.Rngs(0))
        variables = nnx.state(model)
    plan = make_plan(model, variables, TOKENS, recipe=recipe)
    qvariables = quantize(variables, plan)
    save(tmp_path, qvariables, plan)
    loaded, loaded_plan = load(tmp_path)
    if kind == "linen":
        before = wrap(model, plan).apply(qvariables, TOKENS)
        after = wrap(model, loaded_plan).apply(loaded, TOKENS)
    else:
        before = wrap(model, plan, qvariables)(TOKENS)
        after = wrap(model, loaded_plan, loaded)(TOKENS)
    assert bits(before) == bits(after)


@pytest.mark.parametrize("layout", [Layout(order=(-1, -2)), Layout(order=(-1, -2), packed=4)])
def test_the_canonical_layout_is_what_is_stored(layout, tmp_path):
    q = some_qarray((16, 6), Scheme(values=INT4, tile=Tile(contracted=4)))
    plan = plan_of({"w": q})
    prepared = stamped({"params": {"w": relayout(q, layout)}}, plan.fingerprint)
    save(tmp_path, prepared, plan)
    loaded, _ = load(tmp_path)
    assert loaded["params"]["w"].layout == CANONICAL
    assert_same(loaded["params"]["w"], q)


def test_codes_and_scales_are_loaded_where_their_shards_belong(tmp_path):
    scheme = Scheme(values=INT4, tile=Tile(contracted=8))
    qarrays = {"a/kernel": some_qarray((64, 12), scheme), "b/kernel": some_qarray((72, 10), scheme)}
    params = {"a": {"kernel": qarrays["a/kernel"]}, "b": {"kernel": qarrays["b/kernel"]}}
    params["a"]["bias"] = jnp.ones(12)
    plan = plan_of(qarrays)
    tree = stamped({"params": params}, plan.fingerprint)
    save(tmp_path, tree, plan)
    loaded, _ = load(tmp_path, sharding=(MESH, {"*/kernel": P("x"), "*": P("x")}))
    assert_same(loaded, tree)
    specs = jax.tree.map(lambda x: x.sharding.spec, loaded)["params"]
    assert specs["a"]["kernel"].codes == P("x", None)
    assert specs["a"]["kernel"].scale == P("x", None)
    # Nine groups over four devices: the scales are whole on each.
    assert specs["b"]["kernel"].codes == P("x", None)
    assert specs["b"]["kernel"].scale == P(None, None)
    assert specs["a"]["bias"] == P("x")
    columns = {"a/kernel": P(None, "x")}
    loaded, _ = load(tmp_path, sharding=lambda path: NamedSharding(MESH, columns.get(path, P())))
    # Shards of three codes: a byte and a half.
    assert_same(loaded, tree)
    with pytest.raises(ValueError, match=r"b/kernel, shape \(72, 10\) .*cannot be placed"):
        load(tmp_path, sharding=(MESH, {"*/kernel": P(None, "x"), "*": P()}))


def test_a_sharded_tree_is_saved_as_a_whole_one_is(tmp_path):
    tree, plan = linen_tree()
    save(tmp_path / "whole", tree, plan)
    sharding = NamedSharding(MESH, P())
    save(tmp_path / "sharded", jax.tree.map(lambda x: jax.device_put(x, sharding), tree), plan)
    assert stored_bytes(tmp_path / "whole") == stored_bytes(tmp_path / "sharded")


def stored_bytes(folder: pathlib.Path) -> dict:
    """The chunk of each part of each tensor; all are small enough to be one chunk."""
    manifest = read_manifest(folder)
    return {
        (tensor.path, role): [
            path.read_bytes()
            for path in (folder / manifest.data / "arrays" / part.array).iterdir()
            if path.name != ".zarray"
        ]
        for tensor in manifest.tensors
        for role, part in tensor.parts.items()
        if part.bytes
    }


def test_the_arrays_are_an_orbax_checkpoint_that_orbax_itself_restores(tmp_path):
    tree, plan = linen_tree()
    manifest = save(tmp_path, tree, plan)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / manifest.data / "arrays" / "0000")
    tensor = next(t for t in manifest.tensors if t.path == "int8/channel")
    codes = restored[tensor.parts["codes"].array.removeprefix("0000/")]
    assert np.array_equal(codes, tree["params"]["int8"]["channel"].codes)


def test_metadata_and_files_travel_along(tmp_path):
    tree, plan = linen_tree()
    metadata = {"family": "toy", "config": {"width": 3, "tied": True, "theta": 1.5}}
    files = {"tokenizer.json": b"{}", "notes.txt": bytes(range(256))}
    save(tmp_path, tree, plan, metadata=metadata, extra_files=files)
    manifest = read_manifest(tmp_path)
    assert manifest.metadata == metadata
    assert read_files(tmp_path) == files


def test_the_manifest_counts_packed_bytes(tmp_path):
    tree, plan = linen_tree()
    params = {"params": tree["params"]}
    manifest = save(tmp_path, stamped(params, plan.fingerprint), plan)
    held = jax.tree.leaves(params, is_leaf=is_qarray)
    assert manifest.bytes == sum(map(bytes_held, held))


def test_a_new_save_replaces_the_old_one_and_what_interrupted_saves_left(tmp_path):
    tree, plan = linen_tree()
    save(tmp_path, tree, plan, metadata={"number": 1})
    (tmp_path / "data-0123456789abcdef" / "arrays").mkdir(parents=True)
    (tmp_path / "manifest.json.data-0123456789abcdef").touch()
    (tmp_path / "report.json").write_text("the user's own")
    manifest = save(tmp_path, tree, plan, metadata={"number": 2})
    assert read_manifest(tmp_path) == manifest
    assert manifest.metadata == {"number": 2}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"manifest.json", manifest.data, "report.json"}
    assert_same(load(tmp_path)[0], tree)


def test_progress_names_every_tensor(tmp_path):
    tree, plan = linen_tree()
    saved, loaded = [], []
    manifest = save(tmp_path, tree, plan, progress=saved.append)
    load(tmp_path, progress=loaded.append)
    assert saved == loaded == [tensor.path for tensor in manifest.tensors]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    tree, plan = linen_tree()
    folder = tmp_path_factory.mktemp("pristine")
    save(folder, tree, plan, extra_files={"tokenizer.json": b"{}"})
    return folder


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def load_all(folder: pathlib.Path) -> None:
    load(folder)
    read_files(folder)


def flip(content: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("kind", ["flipped byte", "cut short", "missing"])
def test_damage_to_any_file_is_reported_by_its_name(pristine, kind):
    random = np.random.default_rng(0)
    for path in files_of(pristine):
        content = path.read_bytes()
        if kind == "flipped byte" and content:
            path.write_bytes(flip(content, random.integers(len(content)), random.integers(8)))
        elif kind == "cut short" and content:
            path.write_bytes(content[: random.integers(len(content))])
        elif kind == "missing":
            path.unlink()
        else:
            continue
        name = path.relative_to(pristine).as_posix().partition("/")[2] or path.name
        with pytest.raises(CheckpointError, match=re.escape(name)) as error:
            load_all(pristine)
        assert "\n" not in str(error.value)
        path.write_bytes(content)
    load_all(pristine)


def test_a_flipped_byte_anywhere_is_noticed(pristine):
    random = np.random.default_rng(1)
    paths = files_of(pristine)
    sizes = np.array([path.stat().st_size for path in paths])
    for position in random.integers(0, sizes.sum(), 60):
        index = int(np.searchsorted(sizes.cumsum(), position, side="right"))
        content = paths[index].read_bytes()
        at = int(position - sizes[:index].sum())
        paths[index].write_bytes(flip(content, at, random.integers(8)))
        with pytest.raises(CheckpointError, match=re.escape(paths[index].name)):
            load_all(pristine)
        paths[index].write_bytes(content)
    load_all(pristine)


def test_damage_says_which_tensor_it_is_part_of(pristine):
    manifest = read_manifest(pristine)
    tensor = next(t for t in manifest.tensors if t.path == "int4/zero")
    path = pristine / manifest.data / "arrays" / tensor.parts["scale"].array / "0.0"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"bytes, not 96 \(scale of int4/zero\)"):
        load(pristine)
    path.write_bytes(content)


def test_a_manifest_that_contradicts_itself_is_refused(tmp_path):
    from msgspec.structs import replace

    from jaxquant.checkpoint import _manifest

    tree, plan = linen_tree()
    manifest = save(tmp_path, tree, plan)
    tensors = tuple(
        replace(t, scheme={**t.scheme, "values": "e4m3"}) if t.path == "int8/channel" else t
        for t in manifest.tensors
    )
    data = _manifest.encode(replace(manifest, tensors=tensors))
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError, match="describes int8/channel wrongly"):
        load(tmp_path)


SHAPE = jax.ShapeDtypeStruct((2,), jnp.float32)

REFUSED = {
    "another plan": (
        lambda tree, plan: (tree, dataclasses.replace(plan, sites=()), {}),
        ValueError,
        "were quantized by the plan",
    ),
    "no plan's tree": (
        lambda tree, plan: ({"params": tree["params"]}, plan, {}),
        ValueError,
        "were quantized by the plan None",
    ),
    "shapes": (
        lambda tree, plan: ({**tree, "batch": {"a": SHAPE}}, plan, {}),
        TypeError,
        "batch/a is a ShapeDtypeStruct",
    ),
    "a QArray that is none": (
        lambda tree, plan: (
            {**tree, "params": {"q": dataclasses.replace(qarrays_of(tree)[0], scale=jnp.ones(3))}},
            plan,
            {},
        ),
        ValueError,
        r"q: A scale of shape \(3,\)",
    ),
    "metadata that JSON has not": (
        lambda tree, plan: (tree, plan, {"metadata": {"a": object()}}),
        ValueError,
        "metadata has to be what JSON can hold",
    ),
    "not a number": (
        lambda tree, plan: (tree, plan, {"metadata": {"a": float("nan")}}),
        ValueError,
        "metadata has to be what JSON can hold",
    ),
    "a file outside": (
        lambda tree, plan: (tree, plan, {"extra_files": {"../a": b""}}),
        ValueError,
        "cannot be the name of an extra file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(case, tmp_path):
    make, kind, words = REFUSED[case]
    tree, plan, arguments = make(*linen_tree())
    with pytest.raises(kind, match=words):
        save(tmp_path / "out", tree, plan, **arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=f"{path} holds no manifest.json"):
            load(path)
