"""The zarr.json of arrays: changed, cut short or gone."""

import json
from pathlib import Path

import numpy as np
import pytest

from stores import Store, damaged_metadata, gather, write_metadata
from tests.stores.small_store import SPEC, values, whole

NAMES = (*SPEC.arrays, "done")
CHUNKS = {"name": "regular", "configuration": {"chunk_shape": [3]}}
KEYS = {"name": "default", "configuration": {"separator": "."}}
BIG = [{"name": "bytes", "configuration": {"endian": "big"}}]
ZSTD = {"name": "zstd", "configuration": {"level": 0, "checksum": False}}
OTHERS = {
    "dtype": ("bias", {"data_type": "int32", "fill_value": 0}, "dtype float32", "int32"),
    "shape": ("bias", {"shape": [6]}, r"shape \(5,\)", r"\(6,\)"),
    "chunks": ("bias", {"chunk_grid": CHUNKS}, r"chunks \(2,\)", r"\(3,\)"),
    "keys": ("bias", {"chunk_key_encoding": KEYS}, "keys .*'/'", r".*'\.'"),
    "endian": ("weights", {"codecs": BIG}, "dtype float16", "float16 of big endian"),
    "codecs": ("chosen", {"codecs": [{"name": "bytes"}, ZSTD]}, "codecs .*blosc", ".*zstd"),
    "marks": ("done", {"shape": [2]}, r"shape \(3,\)", r"\(2,\)"),
}


def change(store, name, fields):
    file = Path(store.path, name, "zarr.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(("name", "fields", "expected", "got"), OTHERS.values(), ids=OTHERS)
def test_metadata_that_tells_another_layout_is_refused(full, name, fields, expected, got):
    full.discard(1)
    change(full, name, fields)
    told = (
        f"expected {expected}.* in .*/{name}/zarr.json, as .*/zarr.json tells, got {got}.*restore"
    )
    store = Store.open(full.path)
    assert store.verify() == [0, 2]
    assert damaged_metadata(store) == ([], [name])
    with pytest.raises(ValueError, match=told):
        store.write_block(1, values(1))
    assert store.pending() == [1]
    if name != "done":
        with pytest.raises(ValueError, match=told):
            store.numpy(name, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [None, b"", b'{"zarr_format": 3', b"[]", b"{}"])
def test_metadata_that_is_gone_is_written_again_as_it_was(full, name, content):
    file = Path(full.path, name, "zarr.json")
    before = file.read_bytes()
    file.unlink() if content is None else file.write_bytes(content)
    store, told = Store.open(full.path), f"{file} is (missing|damaged); restore it from a copy, or"
    assert damaged_metadata(store) == ([name], [])
    assert store.verify() == [0, 1, 2]
    if name != "done":
        with pytest.raises(ValueError, match=told):
            store.numpy(name)
    write_metadata(store.place, store.spec, name)
    assert file.read_bytes() == before
    assert damaged_metadata(store) == ([], [])
    assert store.verify() == []
    for array in SPEC.arrays:
        np.testing.assert_array_equal(store.numpy(array), whole(array))


def test_rows_are_read_as_the_root_tells(full):
    change(full, "weights", {"data_type": "int16", "fill_value": 0})
    found = gather(Store.open(full.path), "weights", np.arange(10))
    np.testing.assert_array_equal(found, whole("weights"))


def test_an_open_handle_is_checked_once(full):
    handle = full.array("bias")
    change(full, "bias", {"shape": [6]})
    assert full.array("bias") is handle


def test_constants_and_ids_without_metadata_are_named(full):
    for name, read in [("scale", lambda: full.constant("scale")), ("train_id", full_ids(full))]:
        Path(full.path, name, "zarr.json").unlink()
        with pytest.raises(ValueError, match=f"{name}/zarr.json is missing; restore .* or remove"):
            read()


def full_ids(store):
    return lambda: store.ids("train")
