import os
import zlib

import numpy as np
import pytest
import zarr

from stores import ArraySpec, BlockDone, Provenance, Store, StoreSpec
from stores.folder import Folder
from stores.writing import mark_of

ROWS, TARGETS = 11, 5
SPEC = StoreSpec(
    "scores",
    "target",
    2,
    {
        "effects": ArraySpec(("train", "target", None), (ROWS, TARGETS, 3), "float32", rows=4),
        "margins": ArraySpec(("train", "target"), (ROWS, TARGETS), "float16", rows=2),
        "best": ArraySpec(("target", "train"), (TARGETS, ROWS), "bool", rows=6),
    },
)


def values(block):
    random = np.random.default_rng(block)
    return {
        name: random.normal(size=SPEC.block_shape(name, block)).astype(array.dtype)
        for name, array in SPEC.arrays.items()
    }


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / "s", SPEC, Provenance({}))


def write_slabs(store, block, heights):
    arrays = values(block)
    with store.writing(block) as writer:
        start = 0
        for height in heights:
            for name in ("effects", "margins"):
                writer.append(name, arrays[name][start : start + height])
            start += height
        writer.append("best", arrays["best"])


@pytest.mark.parametrize("heights", [(4, 4, 3), (8, 3), (ROWS,)])
def test_slabs_give_the_block_and_the_mark_of_whole_arrays(store, heights):
    write_slabs(store, 2, heights)
    store.write_block(1, values(1))
    for block in (1, 2):
        for name, expected in values(block).items():
            np.testing.assert_array_equal(store.numpy(name, block), expected)
    assert store.verify() == []
    crcs = {name: zlib.crc32(value.tobytes()) for name, value in values(2).items()}
    assert int(zarr.open_array(f"{store.path}/done", mode="r")[2]) == mark_of(crcs)


def test_an_interrupted_block_is_pending_and_can_be_written_again(store):
    def interrupted():
        with store.writing(0) as writer:
            writer.append("effects", values(0)["effects"][:4])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert store.pending() == [0, 1, 2]
    write_slabs(store, 0, (4, 4, 3))
    assert (store.done(), store.verify()) == ([0], [])


def test_a_block_that_is_not_written_to_its_end_is_refused(store):
    def unfinished():
        with store.writing(0) as writer:
            writer.append("effects", values(0)["effects"][:8])

    with pytest.raises(
        ValueError, match="'effects' of block 0 up to row 11 of its first axis, got 8"
    ):
        unfinished()
    assert store.done() == []


@pytest.mark.parametrize(
    ("pieces", "error", "message"),
    [
        (
            [np.ones((3, 2, 3), np.float32)],
            ValueError,
            "slabs of it of 4 rows or a multiple; got 3",
        ),
        ([np.ones((12, 2, 3), np.float32)], ValueError, "got 12 rows from row 0 on"),
        (
            [np.ones((8, 2, 3), np.float32), np.ones((4, 2, 3), np.float32)],
            ValueError,
            "got 4 rows from row 8 on",
        ),
        ([np.ones((4, 2, 3))], ValueError, "of dtype float32, got float64"),
        ([[1.0]], TypeError, "expected a numpy array as 'effects' of block 0, got list"),
    ],
)
def test_wrong_slabs_are_refused(store, pieces, error, message):
    def write():
        with store.writing(0) as writer:
            for piece in pieces:
                writer.append("effects", piece)

    with pytest.raises(error, match=message):
        write()
    assert store.done() == []


def test_a_second_writer_of_a_done_block_is_told(store):
    store.write_block(0, values(0))
    with pytest.raises(BlockDone, match=r"block 0 of .* is done already"):
        store.write_block(0, values(0))


def test_blocks_reach_the_disk_before_their_marks(store, monkeypatch):
    synced = []
    monkeypatch.setenv("DATAMODEL_MATCHING_DURABLE", "1")
    monkeypatch.setattr(Folder, "sync", lambda place, names: synced.append(list(names)))
    store.write_block(2, values(2))
    assert synced == [
        [f"effects/c/{i}/2/0" for i in range(3)]
        + [f"margins/c/{i}/2" for i in range(6)]
        + ["best/c/2/0", "best/c/2/1"],
        ["done/c/2"],
    ]


def test_files_and_their_folders_are_flushed(tmp_path, monkeypatch):
    folder, flushed, fsync = Folder(str(tmp_path)), [], os.fsync
    folder.write("a/b", b"1")
    folder.write("a/c", b"2")

    def note(handle):
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    folder.sync(["a/b", "a/c"])
    above = [str(tmp_path), str(tmp_path.parent)]
    assert flushed == [f"{tmp_path}/a/b", f"{tmp_path}/a/c", f"{tmp_path}/a", *above]


def test_marks_of_the_first_schema_version_are_still_understood(store):
    store.write_block(0, values(0))
    group = zarr.open_group(store.path, mode="r+")
    chain = 0
    for name in sorted(SPEC.arrays):
        chain = zlib.crc32(values(0)[name].tobytes(), chain)
    group["done"][0] = chain
    assert Store.open(store.path).verify() == [0]
    group.attrs["schema_version"] = 1
    old = Store.open(store.path)
    old.write_block(1, values(1))
    assert old.verify() == []
    os.truncate(f"{store.path}/margins/c/0/0", 1)
    assert old.verify() == [0]
