"""docs/format.md is enough to read a checkpoint: its program, which knows no jaxquant, does."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized_trees import linen_tree, nnx_tree

from jaxquant.checkpoint import _manifest, _tree, save
from jaxquant.intercept._variables import named_leaves
from jaxquant.numerics import FORMATS
from jaxquant.qarray import dequantize, is_qarray

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def read_checkpoint():
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert "jaxquant." not in program
    scope: dict = {}
    exec(program, scope)
    return scope["read_checkpoint"]


@pytest.mark.parametrize("make", [linen_tree, nnx_tree])
def test_the_program_of_the_specification_reads_every_tensor(make, read_checkpoint, tmp_path):
    tree, plan = make()
    save(tmp_path, tree, plan)
    read = read_checkpoint(tmp_path)
    wanted = {path: value for path, _, value in named_leaves(tree)}
    assert read.keys() == wanted.keys()
    for path, value in wanted.items():
        if is_qarray(value):
            value = dequantize(value)
        elif jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        assert (read[path].shape, read[path].dtype) == (value.shape, value.dtype)
        assert read[path].tobytes() == np.asarray(value).tobytes()


def test_the_program_notices_damage(read_checkpoint, tmp_path):
    tree, plan = linen_tree()
    save(tmp_path, tree, plan)
    text = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").write_bytes(text.replace(b'"linen"', b'"lemon"'))
    with pytest.raises(AssertionError, match="manifest.json is damaged"):
        read_checkpoint(tmp_path)


def test_the_specification_names_every_key_version_and_type(tmp_path):
    tree, plan = nnx_tree()
    save(tmp_path, tree, plan)
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    assert f"Version {_manifest.VERSION}." in TEXT
    keys = {*manifest, *manifest["plan"]}
    for row in (*manifest["tensors"], *manifest["plan"]["sites"], *manifest["plan"]["leaves"]):
        keys |= {*row, *(row.get("scheme") or {})}
        for part in row.get("parts", {}).values():
            keys |= set(part)
    names = {name.removeprefix("flax.nnx.") for name in _tree.VARIABLES} | set(_tree.BOXES)
    missing = [word for word in keys | names if f"`{word}`" not in TEXT]
    missing += [name for name in FORMATS if name.lower() not in TEXT]
    assert not missing
