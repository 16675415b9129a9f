import pickle

import numpy as np
import pytest

from stores import (
    ArraySpec,
    BlockDone,
    Provenance,
    Store,
    StoreSpec,
    column,
    gather,
    mapped,
    place,
    total,
)

ROWS, TARGETS, OUTPUTS = 53, 11, 3
SHAPES = {
    "float16": {"dtype": "float16", "rows": 20},
    "whole": {"dtype": "float32"},
    "compressed": {"dtype": "float32", "rows": 20, "compress": True},
}
IDS = {"train": [f"train-{row}" for row in range(ROWS)]}


@pytest.fixture
def empty(bucket):
    return place(f"{bucket}/run/scores")


def spec(axis="target", dtype="float32", rows=20, compress=False):
    array = ArraySpec(
        ("train", "target", "output"), (ROWS, TARGETS, OUTPUTS), dtype, rows, compress
    )
    return StoreSpec("scores", axis, 4, {"scores": array})


def create(path, layout):
    return Store.create(
        path, layout, Provenance({"seed": 0}), {"lambda": np.array([0.5])}, IDS, {"name": "x"}
    )


def values(layout):
    array = layout.arrays["scores"]
    return np.random.default_rng(0).integers(-9, 9, array.shape).astype(array.dtype)


def write(store, *blocks):
    axis = store.spec.block_axis("scores")
    for block in blocks:
        span = store.spec.span(block)
        part = values(store.spec).take(np.arange(span.start, span.stop), axis)
        store.write_block(block, {"scores": part})
    return store


def test_a_store_is_created_written_resumed_and_finished(empty):
    created = create(empty.url, spec())
    assert created.path == empty.url
    write(created, 1)
    store = Store.open(empty.url, "scores")
    assert (store.done(), store.pending()) == ([1], [0, 2])
    assert store.ids("train") == IDS["train"]
    assert store.constant("lambda") == 0.5
    assert store.attributes == {"name": "x"}
    with pytest.raises(BlockDone, match=rf"block 1 of {empty} is done already"):
        write(store, 1)
    with pytest.raises(ValueError, match=rf"blocks 0, 2 of {empty} are pending"):
        store.finalize()
    again = Store.open_or_create(empty, spec(), Provenance({"seed": 0}), ids=IDS)
    write(again, *again.pending()).finalize()
    np.testing.assert_array_equal(store.numpy("scores"), values(store.spec))
    np.testing.assert_array_equal(store.dask("scores").compute(), values(store.spec))
    assert store.verify() == []


def test_a_store_of_other_settings_is_refused(empty):
    create(empty, spec())
    with pytest.raises(ValueError, match="exists already"):
        create(empty, spec())
    with pytest.raises(ValueError, match="seed"):
        Store.open_or_create(empty, spec(), Provenance({"seed": 1}), ids=IDS)


def test_a_creation_that_was_killed_half_way_is_done_again(empty):
    create(empty, spec())
    made = {name: empty.read(name) for name in empty.walk()}
    empty.clear()
    for name in ("train_id/c/0", "scores/zarr.json", "done/zarr.json"):
        empty.write(name, made[name])
    with pytest.raises(ValueError, match="found none"):
        Store.open(empty)
    store = Store.open_or_create(empty, spec(), Provenance({"seed": 0}), ids=IDS)
    assert write(store, 0, 1, 2).finalize().verify() == []


def test_a_store_is_sent_as_its_address(empty):
    store = write(create(empty, spec()), 0)
    sent = pickle.dumps(store)
    assert b"secret" not in sent
    assert pickle.loads(sent).done() == [0]


@pytest.mark.parametrize("axis", ["train", "target"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_rows_equal_zarrs_own_indexing(empty, axis, changes):
    layout = spec(axis, **({"rows": None} | changes if axis == "target" else changes | {"rows": 4}))
    store = create(empty, layout)
    write(store, *store.pending())
    for rows in ([52, 3, 20, 19, 0, 41, 3], [], list(range(ROWS))):
        positions = np.array(rows, np.int64)
        wanted = store.array("scores").oindex[np.unique(positions)]
        wanted = wanted[np.unique(positions, return_inverse=True)[1]]
        np.testing.assert_array_equal(gather(store, "scores", positions), wanted)
        np.testing.assert_array_equal(
            total(store, "scores", positions), wanted.sum(0, dtype=np.float32)
        )


def test_columns_and_mapped_blocks(empty):
    store = write(create(empty, spec(rows=None)), 2)
    np.testing.assert_array_equal(mapped(store, "scores", 2), values(store.spec)[:, 8:])
    np.testing.assert_array_equal(column(store, "scores", 9), values(store.spec)[:, 9])


def test_damaged_blocks_are_found_discarded_and_written_again(empty):
    store = write(create(empty, spec()), 0, 1, 2)
    flipped = bytearray(empty.read("scores/c/0/1/0"))
    flipped[5] ^= 1
    empty.write("scores/c/0/1/0", bytes(flipped))
    empty.write("scores/c/2/2/0", empty.read("scores/c/2/2/0")[:-1])
    with pytest.raises(ValueError, match=r"expected 960 bytes in .*c/2/2/0, got 959"):
        gather(store, "scores", np.array([52]))
    assert store.verify() == [1, 2]
    empty.remove("scores/c/2/2/0")
    with pytest.raises(ValueError, match=r"c/2/2/0 is missing; discard block 2"):
        gather(store, "scores", np.array([52]))
    for block in store.verify():
        store.discard(block)
    assert write(store, *store.pending()).verify() == []


def test_silence_of_the_service_is_no_damage(empty, monkeypatch):
    store = write(create(empty, spec()), 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("stores.bucket_client._RETRIES", {"max_retries": 0})
    with pytest.raises(ConnectionError, match=rf"listing {empty}"):
        store.verify()
    with pytest.raises(ConnectionError, match=rf"reading {empty}"):
        Store.open(empty)
