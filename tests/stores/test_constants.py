import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from stores import Store, damaged_constants, wholes
from tests.stores.small_store import MADE_BY, SPEC

WHOLES = {
    "read": ("scale", lambda s: s.constant("scale")),
    "mapped": ("scale", lambda s: Store.open(s.path).map_constant("scale")),
    "ids": ("target_id", lambda s: s.ids("target")),
}


@pytest.mark.parametrize(("name", "read"), WHOLES.values(), ids=WHOLES)
def test_damaged_constants_and_ids_are_found_and_refused(store, name, read):
    file = Path(store.path, name, *"c00"[: store._readable(name).ndim + 1])
    content = file.read_bytes()
    assert damaged_constants(store) == []
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=f"{name} is damaged .* restore it from a copy, or"):
            read(store)
    assert damaged_constants(Store.open(store.path)) == [name]
    file.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing .* restore it from a copy, or"):
        read(store)
    assert damaged_constants(store) == [name]


def test_stores_without_checksums_are_read_and_miss_no_constant(store):
    root = zarr.open_group(store.path, mode="r+")
    del root.attrs["checksums"]
    old = Store.open(store.path)
    np.testing.assert_array_equal(old.constant("scale"), np.ones((2, 3)))
    Path(store.path, "scale/c/0/0").unlink()
    with pytest.raises(ValueError, match="scale is missing"):
        old.constant("scale")


def test_constants_of_any_shape_and_byte_order_keep_their_checksums(tmp_path):
    wholes = {
        "point": np.array(3.5),
        "none": np.zeros((0, 3), bool),
        "big": np.arange(4, dtype=">i4"),
        "turned": np.arange(6.0).reshape(2, 3).T,
    }
    store = Store.create(tmp_path / "s", SPEC, MADE_BY, wholes, {"model": ["a\0", "é", ""]})
    assert damaged_constants(store) == []
    assert store.ids("model") == ["a\0", "é", ""]
    for name, value in wholes.items():
        np.testing.assert_array_equal(store.constant(name), value)
        np.testing.assert_array_equal(store.map_constant(name), value)


def test_a_mapped_constant_is_read_once_and_never_written(store, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(wholes, "read_whole", lambda *_: pytest.fail("it can be mapped"))
        mapped = store.map_constant("scale")
    mapped[0] = 7
    assert store.map_constant("scale") is mapped
    np.testing.assert_array_equal(store.constant("scale"), np.ones((2, 3)))
    with pytest.raises(ValueError, match="expected one of the constants scale; got 'bias'"):
        store.map_constant("bias")


def test_a_mapped_constant_that_was_cut_short_is_refused(store):
    with Path(store.path, "scale/c/0/0").open("r+b") as file:
        file.truncate(47)
    with pytest.raises(ValueError, match="scale is damaged"):
        store.map_constant("scale")


@pytest.mark.parametrize("fields", [{"data_type": "int64", "fill_value": 0}, {"shape": [3, 2]}])
def test_a_constant_that_would_be_read_otherwise_is_refused(store, fields):
    file = Path(store.path, "scale", "zarr.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    for read in (store.constant, Store.open(store.path).map_constant):
        with pytest.raises(ValueError, match=r"scale/zarr\.json is damaged .* restore it from a"):
            read("scale")
    assert damaged_constants(store) == ["scale"]
