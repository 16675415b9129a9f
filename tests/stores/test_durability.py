"""With DATAMODEL_MATCHING_DURABLE=1 nothing is relied on that a loss of power could take."""

import os

import numpy as np
import pytest

from stores import ArraySpec, Provenance, Store, StoreSpec
from stores.folder import Folder

SPEC = StoreSpec("masks", "model", 1, {"mask": ArraySpec(("model",), (2,), "bool")})


@pytest.fixture
def events(monkeypatch):
    """What was flushed and what was given a name, in order."""
    noted = []

    def fsync(handle):
        noted.append(("flush", os.readlink(f"/proc/self/fd/{handle}")))

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("replace", "link", "rename"):
        monkeypatch.setattr(os, name, naming(getattr(os, name), noted))
    return noted


def naming(call, noted):
    def named(old, new):
        call(old, new)
        noted.append(("name", str(old), str(new)))

    return named


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path / "run"))


@pytest.fixture
def _durable(monkeypatch):
    monkeypatch.setenv("DATAMODEL_MATCHING_DURABLE", "1")


@pytest.mark.usefixtures("_durable")
@pytest.mark.parametrize("kind", ["write", "create"])
def test_a_file_is_flushed_before_it_has_its_name_and_its_folders_afterwards(folder, events, kind):
    getattr(folder, kind)("a/b", b"1")
    aside = events[0][1]
    assert events == [
        ("flush", aside),
        ("name", aside, f"{folder}/a/b"),
        ("flush", f"{folder}/a"),
        ("flush", f"{folder}"),
        ("flush", os.path.dirname(folder.url)),
    ]
    assert aside.startswith(f"{folder}/a/b.")


@pytest.mark.usefixtures("_durable")
def test_what_is_removed_stays_so(folder, events):
    folder.write("a/b", b"1")
    folder.write("a/c", b"1")
    events.clear()
    folder.remove("a/b")
    assert events[0] == ("flush", f"{folder}/a")
    events.clear()
    folder.clear()
    assert events == [("flush", os.path.dirname(folder.url))]


@pytest.mark.usefixtures("_durable")
def test_a_store_appears_once_all_of_it_is_on_the_disk(folder, events):
    constants = {"scale": np.ones(3)}
    store = Store.create(folder / "s", SPEC, Provenance({}), constants, {"model": ["a", "b"]})
    (moved,) = [i for i, event in enumerate(events) if event[-1] == store.path]
    before = {event[1].split(".tmp/")[-1] for event in events[:moved] if event[0] == "flush"}
    assert before >= set(store.place.walk())
    assert {"zarr.json", "scale/c/0", "model_id/c/0", "mask/zarr.json"} <= before
    assert events[moved + 1] == ("flush", folder.url)


@pytest.mark.usefixtures("_durable")
def test_the_state_of_a_store_is_flushed(folder, events):
    store = Store.create(folder / "s", SPEC, Provenance({}))
    for block in (0, 1):
        store.write_block(block, {"mask": np.ones(1, bool)})
    events.clear()
    store.finalize()
    (flushed, aside), (named, old, new), (then, parent) = events[:3]
    assert (flushed, named, then) == ("flush", "name", "flush")
    assert (aside, new, parent) == (old, f"{store.path}/zarr.json", store.path)


def test_without_it_nothing_waits_for_the_disk(folder, events):
    store = Store.create(folder / "s", SPEC, Provenance({}))
    store.write_block(0, {"mask": np.ones(1, bool)})
    folder.write("a", b"1")
    assert not [event for event in events if event[0] == "flush"]
