"""Writers end once a file that they watch changes: what they write is marked no more."""

import sys

import numpy as np
import pytest

from stores import (
    ArraySpec,
    Provenance,
    Store,
    StoreSpec,
    pickle_by_value,
    place,
    run_blocks,
    watch,
    watching,
    workers,
)

pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
SPEC = StoreSpec("masks", "model", 1, {"mask": ArraySpec(("model",), (4,), "bool")})
ONE = {"mask": np.ones(1, bool)}


@pytest.fixture(scope="module", autouse=True)
def _no_workers_left():
    yield
    workers.stop_local_workers()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "kept").write_text("1")
    return place(tmp_path)


@pytest.fixture
def store(folder):
    return Store.create(folder / "store", SPEC, Provenance({}))


def write_while(store, act):
    with store.writing(1) as writer:
        writer.append("mask", ONE["mask"])
        act()


def put(folder, name, content):
    folder.remove(name) if content is None else folder.write(name, content)


def watched(folder):
    return watching(watch(folder, ["journal", "kept"], "rows leave: try again"))


@pytest.mark.parametrize("change", [("journal", b""), ("kept", b"2"), ("kept", None)], ids=str)
def test_a_block_is_not_marked_once_a_file_changed(folder, store, change):
    name, content = change
    with watched(folder):
        store.write_block(0, ONE)
        with pytest.raises(ValueError, match="rows leave: try again"):
            write_while(store, lambda: put(folder, name, content))
        with pytest.raises(ValueError, match="rows leave"):
            store.write_block(2, ONE)
    assert store.done() == [0]
    store.write_block(2, ONE)


def test_no_store_is_created_once_a_file_changed(folder):
    with watched(folder):
        folder.write("journal", b"")
        with pytest.raises(ValueError, match="rows leave"):
            Store.create(folder / "late", SPEC, Provenance({}))
    assert folder.walk() == ["journal", "kept"]


@pytest.mark.parametrize("number", [0, 1])
def test_workers_are_bound_by_what_the_driver_watches(folder, store, number):
    def work(block):
        with store.writing(block) as writer:
            writer.append("mask", ONE["mask"])
            if block == 1:
                folder.write("journal", b"")

    with watched(folder), pytest.raises(ValueError, match="rows leave"):
        run_blocks(work, [0, 1, 2], title="writing", workers=number)
    assert store.done() == [0]
