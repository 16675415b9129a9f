import os
from pathlib import Path

import numpy as np
import pytest
import zarr

from stores import ArraySpec, Provenance, Store, StoreSpec, taken_out
from stores.folder import Folder
from tests.stores.small_store import ARRAYS, IDS, MADE_BY, SPEC, values


def test_create_refuses_an_existing_path(store, tmp_path):
    with pytest.raises(ValueError, match="exists already; open it, or give another folder"):
        Store.create(store.path, SPEC, MADE_BY)
    assert os.listdir(tmp_path / "a") == ["s"]


def test_create_refuses_what_it_cannot_write(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write .*file/s: ") as caught:
        Store.create(tmp_path / "file" / "s", SPEC, MADE_BY)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"ids": {"rows": ["a"]}}, ValueError, "expected ids of the axes .* got 'rows'"),
        ({"ids": {"target": [1, 2]}}, TypeError, "expected texts as ids of 'target', got 1"),
        ({"ids": {"target": ["a"]}}, ValueError, "expected 5 ids of the axis 'target', got 1"),
        ({"ids": {"target": list("abcda")}}, ValueError, "each id of 'target' once, got 'a' twice"),
        ({"constants": {"bias": np.ones(1)}}, ValueError, "expected another name .* 'bias'"),
        ({"constants": {"done": np.ones(1)}}, ValueError, "expected an identifier"),
        ({"constants": {"c": [1]}}, TypeError, "numpy array of numbers as the constant 'c'"),
        ({"constants": {"c": np.array(["a"])}}, TypeError, "array of numbers .*got <U1"),
        ({"attributes": {"a": np.ones(1)}}, TypeError, r"expected a plain value at attributes\.a"),
    ],
)
def test_create_refuses_unusable_parts(tmp_path, named, error, message):
    with pytest.raises(error, match=message):
        Store.create(tmp_path / "s", SPEC, MADE_BY, **named)
    assert os.listdir(tmp_path) == []


def test_open_refuses_what_is_no_such_store(store, tmp_path):
    with pytest.raises(ValueError, match=r"expected a store at .*none, found none"):
        Store.open(tmp_path / "none")
    zarr.create_group(tmp_path / "other")
    with pytest.raises(ValueError, match=r"expected a store of datamodel-matching at .*other"):
        Store.open(tmp_path / "other")
    with pytest.raises(ValueError, match=r"expected a store of kind 'masks' at .*'datamodel'"):
        Store.open(store.path, "masks")
    zarr.open_group(store.path, mode="r+").attrs["schema_version"] = 3
    with pytest.raises(ValueError, match="has schema version 3, expected at most 2"):
        Store.open(store.path)


@pytest.mark.parametrize("content", [b"", b'{"attributes": {"sch', b"[]", b"\xff"])
def test_a_store_whose_root_is_damaged_is_told_from_none(store, content):
    Path(store.path, "zarr.json").write_bytes(content)
    told = rf"{store.path}/zarr.json is damaged; restore it from a copy, or remove {store.path} "
    for read in (Store.open, taken_out):
        with pytest.raises(ValueError, match=told):
            read(store.path)
    with pytest.raises(ValueError, match=told):
        store.array("bias")


def test_open_or_create_resumes_only_the_same(tmp_path):
    path = tmp_path / "s"
    store = Store.open_or_create(path, SPEC, MADE_BY, ids=IDS)
    store.write_block(0, values(0))
    assert Store.open_or_create(path, SPEC, MADE_BY, ids=IDS).done() == [0]
    other = StoreSpec("datamodel", "target", 3, ARRAYS)
    with pytest.raises(ValueError, match="block: stored 2, wanted 3"):
        Store.open_or_create(path, other, MADE_BY, ids=IDS)
    with pytest.raises(ValueError, match="seed: stored 0, wanted 1"):
        Store.open_or_create(path, SPEC, Provenance({"seed": 1}), ids=IDS)
    with pytest.raises(ValueError, match="made for other target ids"):
        Store.open_or_create(path, SPEC, MADE_BY, ids={**IDS, "target": list("abcde")})
    with pytest.raises(ValueError, match="expected a store of kind"):
        Store.open_or_create(path, StoreSpec("masks", "target", 2, ARRAYS), MADE_BY)


def test_a_store_that_another_process_creates_meanwhile_is_opened(tmp_path, monkeypatch):
    spec = StoreSpec("outputs", "model", 2, {"a": ArraySpec(("model",), (3,), "float32")})
    path, looked = tmp_path / "outputs", []
    Store.create(path, spec, Provenance({"seed": 0}))
    taken = Folder.taken

    def not_yet(where):
        looked.append(where)
        return len(looked) > 1 and taken(where)

    monkeypatch.setattr(Folder, "taken", not_yet)
    assert Store.open_or_create(path, spec, Provenance({"seed": 0})).pending() == [0, 1]
