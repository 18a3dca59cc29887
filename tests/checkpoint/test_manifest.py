"""The manifest: plans and metadata come back, and no byte of it changes unnoticed."""

import dataclasses
import hashlib
import json

import msgspec
import numpy as np
import pytest
from methods import Free, Informed, Smooth
from quantized_trees import linen_tree, nnx_tree

from jaxquant.checkpoint import (
    _manifest,
    CheckpointError,
    Manifest,
    read_account,
    read_manifest,
    save,
)
from jaxquant.intercept import Account
from jaxquant.intercept._variables import parameters, unstamped
from jaxquant.ops import Outliers, OutlierWeights
from jaxquant.qarray import WeightError
from jaxquant.recipes import _algorithms


def manifest(**changes) -> Manifest:
    part = {
        "array": "0000/00000.plain",
        "shape": (2,),
        "dtype": "float32",
        "stored_shape": (2,),
        "stored_dtype": "float32",
        "packing": "none",
        "bytes": 8,
    }
    tensor = {"path": "a", "parameter": True, "shape": (2,), "dtype": "float32"}
    fields = {
        "format": _manifest.FORMAT,
        "version": _manifest.VERSION,
        "kind": "linen",
        "data": "data-0123456789abcdef",
        "byte_order": "little",
        "tensors": [{**tensor, "parts": {"plain": part}}],
        "tree": {"dict": []},
        "plan": _manifest.plan_to_dict(linen_tree()[1]),
        "metadata": {"family": "toy", "sizes": [1, 2]},
        "files": [{"name": "arrays/0000/00000.plain/0", "bytes": 8, "sha256": "0" * 64}],
    }
    return msgspec.convert(fields | changes, Manifest)


def test_a_manifest_written_and_read_is_the_same():
    assert _manifest.decode(_manifest.encode(manifest()), "m") == manifest()
    assert manifest().bytes == 8


def test_the_checksum_is_of_what_follows_it_as_the_specification_says():
    data = _manifest.encode(manifest())
    assert json.loads(data)["sha256"] == hashlib.sha256(data[76:]).hexdigest()
    assert data[75:76] == b'"'


def test_every_flipped_bit_and_every_cut_is_noticed():
    data = _manifest.encode(manifest())
    random = np.random.default_rng(0)
    for position in [*range(90), *random.integers(0, len(data), 100)]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << random.integers(8)
        with pytest.raises(CheckpointError, match="m .* does not match its own checksum"):
            _manifest.decode(bytes(flipped), "m")
    for size in [0, 1, 75, 76, 77, len(data) - 1]:
        with pytest.raises(CheckpointError, match=f"m \\({size} bytes\\)"):
            _manifest.decode(data[:size], "m")


def signed(fields: dict) -> bytes:
    """A manifest with other fields, and a checksum that fits them."""
    rest = b"," + json.dumps(fields).encode()[1:]
    return b'{"sha256":"' + hashlib.sha256(rest).hexdigest().encode() + b'"' + rest


def test_unknown_keys_are_passed_over_and_newer_versions_refused():
    fields = msgspec.to_builtins(manifest())
    assert _manifest.decode(signed({**fields, "later": 1}), "m") == manifest()
    with pytest.raises(CheckpointError, match="version 4; this jaxquant reads .* versions 1 to 3"):
        _manifest.decode(signed({**fields, "version": 4}), "m")
    with pytest.raises(CheckpointError, match="of format 'another'"):
        _manifest.decode(signed({**fields, "format": "another"}), "m")


@pytest.mark.parametrize("key", ["tensors", "tree", "plan", "files", "data"])
def test_a_manifest_that_lacks_something_is_refused(key):
    fields = msgspec.to_builtins(manifest())
    del fields[key]
    with pytest.raises(CheckpointError, match=f"no manifest: .*`{key}`"):
        _manifest.decode(signed(fields), "m")


@pytest.mark.parametrize("name", ["../a", "/a", "arrays/../../a", "a\\b"])
def test_names_that_lead_outside_are_refused(name):
    files = [{"name": name, "bytes": 8, "sha256": "0" * 64}]
    with pytest.raises(CheckpointError, match="outside its folder"):
        _manifest.decode(_manifest.encode(manifest(files=files)), "m")
    with pytest.raises(CheckpointError, match="outside its folder"):
        _manifest.decode(_manifest.encode(manifest(data=name)), "m")


def test_a_folder_without_a_manifest_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no manifest.json"):
        read_manifest(tmp_path)


def test_a_plan_comes_back_whole_with_its_fingerprint():
    plan = linen_tree()[1]
    data = json.loads(json.dumps(_manifest.plan_to_dict(plan)))
    back = _manifest.plan_from_dict(data, "m")
    assert back.fingerprint == plan.fingerprint == data["fingerprint"]
    for field in ("recipe", "sites", "leaves", "others", "sizes"):
        assert getattr(back, field) == getattr(plan, field)


def test_a_plan_of_version_1_gets_the_roles_of_its_axes_from_its_sites():
    plan = linen_tree()[1]
    data = json.loads(json.dumps(_manifest.plan_to_dict(plan)))
    for leaf in data["leaves"]:
        del leaf["contracted"], leaf["stack"]
        leaf["tile"] = [1, 1]
    assert _manifest.plan_from_dict(data, "m").leaves == plan.leaves


@pytest.mark.parametrize("make", [linen_tree, nnx_tree])
def test_an_account_comes_back_with_the_errors_that_were_measured(make, tmp_path):
    tree, plan = make()
    known = [leaf.path for leaf in plan.leaves]
    errors = tuple(
        (path, WeightError(relative=0.1 / (i + 3), largest=float(i)))
        for i, path in enumerate(known)
    )
    account = Account(plan=plan, errors=errors[1:])
    save(tmp_path, tree, plan, account=account)
    back = read_account(tmp_path)
    assert back.errors == errors[1:] and back.plan == plan
    assert back.parameters == sum(x.size for x in parameters(unstamped(tree)[0]).values())
    save(tmp_path, tree, plan)
    assert read_account(tmp_path).errors == ()


def test_an_account_of_another_plan_is_refused(tmp_path):
    tree, plan = linen_tree()
    other = Account(plan=dataclasses.replace(plan, leaves=plan.leaves[1:]))
    with pytest.raises(ValueError, match=f"account is of the plan {other.plan.fingerprint}, not"):
        save(tmp_path / "q", tree, plan, account=other)
    assert not (tmp_path / "q").exists()


def test_a_plan_that_cannot_be_read_says_where():
    data = json.loads(json.dumps(_manifest.plan_to_dict(linen_tree()[1])))
    data["leaves"][0]["scheme"]["values"] = "int9"
    with pytest.raises(CheckpointError, match="m holds a plan .*int4/groups.*'int9'"):
        _manifest.plan_from_dict(data, "m")
    del data["leaves"][0]["scheme"]
    with pytest.raises(CheckpointError, match="m holds a plan .*scheme"):
        _manifest.plan_from_dict(data, "m")


def test_a_plan_with_products_comes_back():
    plan = linen_tree()[1]
    scheme = plan.leaves[0].scheme
    product = dataclasses.replace(
        plan.sites[0],
        site="Model/attention#product",
        path="Model/attention",
        op="product",
        shape=(2, 4, 5, 5),
        roles=None,
        weights=None,
        activations=scheme,
    )
    wanted = dataclasses.replace(plan, sites=(*plan.sites, product))
    got = _manifest.plan_from_dict(_manifest.plan_to_dict(wanted), "here")
    assert got.sites == wanted.sites and got.fingerprint == wanted.fingerprint
    assert got.fingerprint != plan.fingerprint


def test_a_plan_with_algorithms_comes_back_and_one_without_is_written_as_before(monkeypatch):
    for registry, name, kind in (
        (_algorithms.ALGORITHMS, "informed", Informed),
        (_algorithms.SCALINGS, "smooth", Smooth),
    ):
        monkeypatch.setitem(registry, name, kind)
    plan = linen_tree()[1]
    added = {
        "algorithm": Informed(damping=0.1),
        "scaling": Smooth(),
        "static": True,
        "outliers": Outliers(weights=OutlierWeights.ORIGINAL),
    }
    assert not any(key in row for row in _manifest.plan_to_dict(plan)["sites"] for key in added)
    sites = (dataclasses.replace(plan.sites[0], **added), *plan.sites[1:])
    wanted = dataclasses.replace(plan, sites=sites)
    data = json.loads(json.dumps(_manifest.plan_to_dict(wanted)))
    got = _manifest.plan_from_dict(data, "here")
    assert got.sites == wanted.sites and got.fingerprint == wanted.fingerprint
    data["sites"][0]["algorithm"] = "newer"
    with pytest.raises(CheckpointError, match="algorithm: there is no 'newer'.*Install"):
        _manifest.plan_from_dict(data, "here")
    sites = (dataclasses.replace(plan.sites[0], algorithm=Free()), *plan.sites[1:])
    with pytest.raises(ValueError, match="Free.* has no name as text"):
        _manifest.plan_to_dict(dataclasses.replace(plan, sites=sites))
