import builtins
import itertools
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stores import ArraySpec, Store, StoreSpec
from stores.folder import Folder
from tests.stores.small_store import (
    ARRAYS,
    IDS,
    MADE_BY,
    SPEC,
    refuse_after_a_look_amid_discard,
    values,
    whole,
)


def test_round_trip(full):
    again = Store.open(full.path, "datamodel")
    assert again == full
    assert pickle.loads(pickle.dumps(full)) == full
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(again.numpy(name), whole(name))
        np.testing.assert_array_equal(again.numpy(name, 2), values(2)[name])
        assert again.numpy(name).dtype == array.dtype
    np.testing.assert_array_equal(again.constant("scale"), np.ones((2, 3)))
    assert {axis: again.ids(axis) for axis in IDS} == IDS
    assert again.attributes == {"note": "x"}
    assert again.complete
    assert again.verify() == []


def test_progress(store):
    assert (store.done(), store.pending(), store.complete) == ([], [0, 1, 2], False)
    store.write_block(1, values(1))
    assert (store.done(), store.pending(), store.complete) == ([1], [0, 2], False)


def test_raw_objects_are_plain_bytes(full):
    with open(f"{full.path}/bias/c/1", "rb") as file:
        assert file.read() == values(1)["bias"].tobytes()


def test_zeros_and_constants_are_stored_as_objects(store):
    zeros = {name: np.zeros_like(value) for name, value in values(0).items()}
    store.write_block(0, zeros)
    np.testing.assert_array_equal(store.numpy("chosen", 0), zeros["chosen"])
    assert os.path.exists(f"{store.path}/chosen/c/0/0")


def test_dask_is_lazy_over_whole_objects(full):
    lazy = full.dask("weights")
    assert lazy.chunks == ((4, 4, 2), (2, 2, 1), (3,))
    np.testing.assert_array_equal(lazy.compute(scheduler="sync"), whole("weights"))
    part = lazy[1:, ::2].max(axis=0).compute(scheduler="sync")
    np.testing.assert_array_equal(part, whole("weights")[1:, ::2].max(axis=0))


def test_xarray_reads_it(full):
    pytest.importorskip("xarray")
    dataset = full.to_xarray()
    assert dataset["weights"].dims == ("train", "target", "weights_2")
    assert list(dataset["target_id"].to_numpy()) == IDS["target"]
    assert dataset.attrs == {"note": "x"}
    np.testing.assert_array_equal(dataset["chosen"].to_numpy(), whole("chosen"))
    np.testing.assert_array_equal(dataset["scale"].to_numpy(), np.ones((2, 3)))


@pytest.mark.parametrize(("name", "file"), [("scale", "c/0/0"), ("target_id", "c/0")])
def test_xarray_refuses_damaged_constants_and_ids(full, name, file):
    pytest.importorskip("xarray")
    path = Path(full.path, name, file)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{name} of .* are missing or damaged; restore them"):
        full.to_xarray()


def test_xarray_is_optional(full, monkeypatch):
    original = builtins.__import__

    def without_xarray(name, *rest, **named):
        if name == "xarray":
            raise ImportError(name)
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_xarray)
    with pytest.raises(ImportError, match=r"pip install 'datamodel-matching\[xarray\]'"):
        full.to_xarray()


def test_the_zarr_view_is_read_only(full):
    with pytest.raises(ValueError, match="read-only"):
        full.array("bias")[0] = 1


@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.numpy("bias"),
        lambda store: store.numpy("bias", 2),
        lambda store: store.dask("bias"),
        lambda store: store.to_xarray(),
        lambda store: store.finalize(),
    ],
)
def test_pending_blocks_are_never_read(store, read):
    store.write_block(0, values(0))
    with pytest.raises(ValueError, match=r"blocks? (1, )?2 of .* (is|are) pending"):
        read(store)


def test_many_pending_blocks_are_named_in_short(tmp_path):
    spec = StoreSpec("a", "model", 1, {"a": ArraySpec(("model",), (30,), "bool")})
    store = Store.create(tmp_path / "s", spec, MADE_BY)
    with pytest.raises(ValueError, match="blocks 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more of"):
        store.numpy("a")


def test_blocks_are_write_once(full):
    with pytest.raises(
        ValueError, match=r"block 1 of .* is done already and blocks are write-once"
    ):
        full.write_block(1, values(1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.pop("bias"), ValueError, "expected the arrays .* for block 2, got"),
        (lambda a: a.update(more=a["bias"]), ValueError, "expected the arrays"),
        (lambda a: a.update(bias=[1.0]), TypeError, "expected a numpy array as 'bias' of block 2"),
        (
            lambda a: a.update(bias=np.ones(2, np.float32)),
            ValueError,
            r"expected 'bias' of block 2 of shape \(1,\), got \(2,\)",
        ),
        (
            lambda a: a.update(bias=np.ones(1)),
            ValueError,
            r"of dtype float32, got float64; convert it with .astype\('float32'\)",
        ),
        (
            lambda a: a.update(bias=np.array([np.nan], np.float32)),
            ValueError,
            "expected finite values in 'bias' of block 2",
        ),
        (
            lambda a: a.update(weights=a["weights"] * np.inf),
            ValueError,
            "expected finite values in 'weights' of block 2",
        ),
    ],
)
def test_wrong_blocks_are_refused(store, change, error, message):
    arrays = values(2)
    change(arrays)
    with np.errstate(all="ignore"), pytest.raises(error, match=message):
        store.write_block(2, arrays)
    assert store.done() == []


def test_blocks_outside_are_refused(store):
    with pytest.raises(ValueError, match="expected a block from 0 to 2, got 3"):
        store.write_block(3, {})
    with pytest.raises(ValueError, match="expected a done block to discard, got block 0"):
        store.discard(0)


def test_unknown_names_are_refused(full):
    with pytest.raises(ValueError, match=r"expected one of the arrays bias.*got 'w'"):
        full.numpy("w")
    with pytest.raises(ValueError, match="expected one of the arrays"):
        full.array("w")
    with pytest.raises(ValueError, match="expected one of the constants scale; got 'w'"):
        full.constant("w")
    with pytest.raises(ValueError, match="expected one of the ids of the axes train, target; got"):
        full.ids("model")


def test_a_flipped_bit_is_found_and_healed(full):
    full.finalize()
    with open(f"{full.path}/bias/c/1", "r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    assert full.verify() == [1]
    full.discard(1)
    assert full.pending() == [1]
    assert zarr.open_group(full.path, mode="r").attrs["state"] == "open"
    full.write_block(1, values(1))
    assert full.verify() == []
    np.testing.assert_array_equal(full.finalize().numpy("bias"), whole("bias"))


@pytest.mark.parametrize("name", ["weights/c/0/1/0", "chosen/c/1/0", "bias/c/1"])
@pytest.mark.parametrize("size", [None, 0, 3])
def test_lost_and_truncated_objects_are_found(full, name, size):
    if size is None:
        os.unlink(f"{full.path}/{name}")
        with pytest.raises(ValueError, match=f"{name} is missing; discard block 1"):
            full.numpy(name.split("/")[0])
    else:
        os.truncate(f"{full.path}/{name}", size)
    assert full.verify() == [1]


def test_finalize_sweeps_leftovers_and_can_be_repeated(full):
    leftover = f"{full.path}/bias/c/1.0123.partial"
    with open(leftover, "wb"):
        pass
    assert full.finalize().finalize() == full
    assert not os.path.exists(leftover)
    assert zarr.open_group(full.path, mode="r").attrs["state"] == "complete"


def test_what_another_process_may_be_writing_is_not_swept(full):
    hands = [f"{full.path}/{name}.0123.partial" for name in ("zarr", "zarr.json", "done/c/1")]
    for file in hands:
        Path(file).touch()
    Path(full.path, "done/1.lock.partial").touch()
    full.finalize()
    assert [file for file in hands if not os.path.exists(file)] == []
    assert not os.path.exists(f"{full.path}/done/1.lock.partial")


def test_who_looks_while_a_block_is_discarded_does_not_trust_it_afterwards(full, monkeypatch):
    refuse_after_a_look_amid_discard(full, 1, monkeypatch)


def test_a_complete_store_is_finalised_without_a_look_at_its_files(full, monkeypatch):
    full.finalize()
    generation = full.place.generation()
    monkeypatch.setattr(Folder, "walk", lambda _: pytest.fail("no need to look"))
    Store.open(full.path).finalize()
    assert full.place.generation() == generation


def test_many_finalise_at_once(tmp_path):
    spec = StoreSpec("a", "model", 2, {"a": ArraySpec(("model",), (2,), "float32")})
    for turn in range(20):
        store = Store.create(tmp_path / str(turn), spec, MADE_BY)
        store.write_block(0, {"a": np.ones(2, np.float32)})
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _, s=store: Store.open(s.path).finalize(), range(8)))
        assert zarr.open_group(store.path, mode="r").attrs["state"] == "complete"


def test_a_mark_that_is_being_written_does_not_count(store):
    os.makedirs(f"{store.path}/done/c")
    with open(f"{store.path}/done/c/1.0123.partial", "wb"):
        pass
    assert store.done() == []


class StoreAgainstDict(RuleBasedStateMachine):
    """Every operation on a store gives what it gives on a dict of blocks."""

    numbers = itertools.count()
    folder = None

    @initialize()
    def create(self):
        self.model = {}
        path = self.folder / str(next(self.numbers))
        self.store = Store.create(path, SPEC, MADE_BY)

    @rule(block=st.integers(0, 2), seed=st.integers(0, 3))
    def write(self, block, seed):
        if block in self.model:
            with pytest.raises(ValueError, match="write-once"):
                self.store.write_block(block, values(block, seed))
        else:
            self.store.write_block(block, values(block, seed))
            self.model[block] = values(block, seed)

    @rule(block=st.integers(0, 2))
    def discard(self, block):
        if self.model.pop(block, None) is None:
            with pytest.raises(ValueError, match="expected a done block"):
                self.store.discard(block)
        else:
            self.store.discard(block)

    @rule()
    def reopen(self):
        self.store = Store.open(self.store.path)

    @rule()
    def finalize(self):
        if len(self.model) == SPEC.blocks:
            self.store.finalize()
        else:
            with pytest.raises(ValueError, match="pending"):
                self.store.finalize()

    @rule(block=st.integers(0, 2), name=st.sampled_from(sorted(ARRAYS)))
    def read(self, block, name):
        if block in self.model:
            np.testing.assert_array_equal(self.store.numpy(name, block), self.model[block][name])
        else:
            with pytest.raises(ValueError, match="pending"):
                self.store.numpy(name, block)

    @invariant()
    def progress(self):
        assert self.store.done() == sorted(self.model)
        assert self.store.pending() == [block for block in range(3) if block not in self.model]
        assert self.store.verify() == []


def test_store_against_dict(tmp_path, monkeypatch):
    monkeypatch.setattr(StoreAgainstDict, "folder", tmp_path)
    machine = StoreAgainstDict.TestCase()
    machine.settings = settings(
        max_examples=15, stateful_step_count=12, derandomize=True, deadline=None, database=None
    )
    machine.runTest()
