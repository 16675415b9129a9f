import os
import tracemalloc

import numpy as np
import pytest

from stores import ArraySpec, Provenance, Store, StoreSpec, column, gather, mapped, pieces, total
from stores.folder import Folder
from stores.halves import sum_halves, widen
from stores.handles import close_files

LENGTH, TARGETS, OUTPUTS = 53, 11, 3
ORDERS = {
    "sorted": [0, 7, 19, 20, 52],
    "any order": [52, 3, 20, 19, 0, 41],
    "duplicates": [5, 5, 52, 5, 0],
    "everything": list(range(LENGTH)),
    "one": [20],
    "none": [],
}


def make(path, *, dtype="float32", axis="target", compress=False, cut=20):
    array = ArraySpec(
        ("train", "target", "output"), (LENGTH, TARGETS, OUTPUTS), dtype, cut, compress
    )
    spec = StoreSpec("scores", axis, 4, {"scores": array})
    store = Store.create(path, spec, Provenance({}))
    values = np.random.default_rng(0).integers(-9, 9, array.shape).astype(dtype)
    return store, values


def fill(store, values, skip=()):
    axis = store.spec.block_axis("scores")
    for block in range(store.spec.blocks):
        if block not in skip:
            span = store.spec.span(block)
            part = values.take(np.arange(span.start, span.stop), axis)
            store.write_block(block, {"scores": part})
    return store


@pytest.mark.parametrize("wanted", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float16"},
        {"dtype": "float64", "cut": None},
        {"axis": "train", "cut": 5},
        {"compress": True},
    ],
    ids=str,
)
def test_rows_equal_numpy(tmp_path, changes, wanted):
    store, values = make(tmp_path / "s", **changes)
    fill(store, values)
    positions = np.array(wanted, dtype=np.int64)
    np.testing.assert_array_equal(gather(store, "scores", positions), values[positions])
    expected = values[positions].sum(0, dtype=np.promote_types(values.dtype, np.float32))
    found = total(store, "scores", positions)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_one_dimensional_arrays(tmp_path):
    spec = StoreSpec("loss", "train", 4, {"loss": ArraySpec(("train",), (6,), "float32")})
    store = Store.create(tmp_path / "s", spec, Provenance({}))
    values = np.arange(6, dtype=np.float32)
    for block in range(2):
        store.write_block(block, {"loss": values[spec.span(block)]})
    np.testing.assert_array_equal(gather(store, "loss", np.array([5, 0, 5])), [5, 0, 5])
    assert total(store, "loss", np.array([5, 0, 5])) == 10


def test_small_batches_give_the_same(tmp_path, monkeypatch):
    store, values = make(tmp_path / "s")
    fill(store, values)
    monkeypatch.setattr(pieces, "_AT_ONCE", 3)
    positions = np.random.default_rng(1).integers(0, LENGTH, 100)
    np.testing.assert_array_equal(gather(store, "scores", positions), values[positions])
    np.testing.assert_array_equal(total(store, "scores", positions), values[positions].sum(0))


def test_without_positioned_reads_zarr_answers(tmp_path, monkeypatch):
    store, values = make(tmp_path / "s")
    fill(store, values)
    monkeypatch.delattr(os, "preadv")
    positions = np.array([3, 52, 3])
    np.testing.assert_array_equal(gather(store, "scores", positions), values[positions])


@pytest.mark.parametrize("function", [gather, total])
def test_pending_blocks_are_refused(tmp_path, function):
    store, values = make(tmp_path / "s")
    fill(store, values, skip=[1])
    with pytest.raises(ValueError, match=r"block 1 of .* is pending"):
        function(store, "scores", np.array([0]))


@pytest.mark.parametrize("function", [gather, total])
@pytest.mark.parametrize("left", [0, 10])
def test_truncated_objects_are_refused(tmp_path, function, left):
    store, values = make(tmp_path / "s")
    fill(store, values)
    os.truncate(tmp_path / "s/scores/c/2/1/0", left)
    with pytest.raises(ValueError, match=rf"expected 960 bytes in .*c/2/1/0, got {left}"):
        function(store, "scores", np.array([52]))


@pytest.mark.parametrize("compress", [False, True])
def test_missing_objects_are_refused(tmp_path, compress):
    store, values = make(tmp_path / "s", compress=compress)
    fill(store, values)
    (tmp_path / "s/scores/c/2/1/0").unlink()
    with pytest.raises(ValueError, match="c/2/1/0 is missing; discard block 1"):
        gather(store, "scores", np.array([52]))


def test_positions_are_checked(tmp_path):
    store, values = make(tmp_path / "s")
    fill(store, values)
    for position in (-1, LENGTH):
        with pytest.raises(ValueError, match=f"expected positions from 0 to 52, got {position}"):
            gather(store, "scores", np.array([0, position]))
    with pytest.raises(TypeError, match=r"1-D array of integers, got bool.*flatnonzero"):
        gather(store, "scores", np.ones(LENGTH, bool))
    with pytest.raises(TypeError, match="1-D array of integers"):
        total(store, "scores", np.zeros((1, 1), int))


def targets(path, *, compress=False, skip=()):
    """An array whose first axis is cut into blocks, the last one padded."""
    array = ArraySpec(("target", "output"), (11, 3), "float32", None, compress)
    store = Store.create(path, StoreSpec("o", "target", 4, {"o": array}), Provenance({}))
    values = np.arange(33, dtype=np.float32).reshape(11, 3)
    for block in set(range(3)) - set(skip):
        store.write_block(block, {"o": values[store.spec.span(block)]})
    return store, values


@pytest.mark.parametrize("compress", [False, True])
def test_rows_of_another_axis_need_their_own_blocks_alone(tmp_path, compress):
    store, values = targets(tmp_path / "s", compress=compress, skip=[1])
    wanted = np.array([10, 3, 8, 0, 3])
    np.testing.assert_array_equal(gather(store, "o", wanted), values[wanted])
    with pytest.raises(ValueError, match=r"block 1 of .* is pending"):
        gather(store, "o", np.array([3, 4]))


def test_sums_are_over_the_axis_train(tmp_path):
    store, _ = targets(tmp_path / "s")
    with pytest.raises(ValueError, match="expected 'train' as first axis of 'o'"):
        total(store, "o", np.array([0]))
    for function in (total, gather):
        with pytest.raises(ValueError, match="expected one of the arrays o; got 'p'"):
            function(store, "p", np.array([0]))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("block", [0, 2])
def test_a_block_is_mapped(tmp_path, compress, block):
    store, values = targets(tmp_path / "s", compress=compress, skip=[1])
    found = mapped(store, "o", block)
    np.testing.assert_array_equal(found, values[store.spec.span(block)])
    assert found.dtype == np.float32
    found[:] = -1
    np.testing.assert_array_equal(mapped(store, "o", block), values[store.spec.span(block)])
    with pytest.raises(ValueError, match=r"block 1 of .* is pending"):
        mapped(store, "o", 1)


def test_a_block_of_several_objects_is_read(tmp_path):
    store, values = make(tmp_path / "s")
    fill(store, values)
    np.testing.assert_array_equal(mapped(store, "scores", 2), values[:, 8:11])


def test_a_block_of_one_raw_object_is_not_copied(tmp_path):
    store, _ = targets(tmp_path / "s")
    found = mapped(store, "o", 1)
    with open(tmp_path / "s/o/c/1/0", "r+b") as file:
        file.write(np.float32(99).tobytes())
    assert found[0, 0] == 99


@pytest.mark.parametrize("left", [0, 10])
def test_a_truncated_block_is_not_mapped(tmp_path, left):
    store, _ = targets(tmp_path / "s")
    os.truncate(tmp_path / "s/o/c/1/0", left)
    with pytest.raises(ValueError, match=rf"expected 48 bytes in .*c/1/0, got {left}"):
        mapped(store, "o", 1)


def scaled(path, *, dtype="float16", compress=False):
    """Scores that are stored in units of a scale, with their sum over all rows."""
    each = ArraySpec(("target", "output"), (TARGETS, OUTPUTS), "float32")
    scores = ArraySpec(
        ("train", "target", "output"),
        (LENGTH, TARGETS, OUTPUTS),
        dtype,
        rows=20,
        compress=compress,
        scale="scale",
        sum="sum",
    )
    spec = StoreSpec("scores", "target", 4, {"scores": scores, "scale": each, "sum": each})
    store, random = Store.create(path, spec, Provenance({})), np.random.default_rng(3)
    stored = random.integers(-9, 9, scores.shape).astype(dtype)
    scale = np.exp2(random.integers(-20, 3, (TARGETS, OUTPUTS))).astype(np.float32)
    values = stored.astype(np.float32) * scale
    for block in range(spec.blocks):
        span = spec.span(block)
        parts = {"scores": stored[:, span], "scale": scale[span], "sum": values[:, span].sum(0)}
        store.write_block(block, parts)
    return store, values


@pytest.mark.parametrize("changes", [{}, {"dtype": "float32"}, {"compress": True}], ids=str)
def test_a_scale_is_applied(tmp_path, changes):
    store, values = scaled(tmp_path / "s", **changes)
    wanted = np.array([52, 3, 20, 3])
    found = gather(store, "scores", wanted)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values[wanted])
    np.testing.assert_array_equal(total(store, "scores", wanted), values[wanted].sum(0))
    np.testing.assert_array_equal(column(store, "scores", 9), values[:, 9])


@pytest.mark.parametrize("left", [0, 1, 26, 27])
def test_many_rows_are_summed_by_their_complement(tmp_path, monkeypatch, left):
    store, values = scaled(tmp_path / "s")
    read = []
    original = Folder.read_batches

    def note(place, batches, *rest):
        read.extend(start for ranges in batches for some in ranges.values() for start in some)
        return original(place, batches, *rest)

    monkeypatch.setattr(Folder, "read_batches", note)
    rows = np.random.default_rng(0).permutation(LENGTH)[left:]
    np.testing.assert_array_equal(total(store, "scores", rows), values[rows].sum(0))
    assert len(read) == 3 * min(left, LENGTH - left)


def test_duplicates_have_no_complement(tmp_path):
    store, values = scaled(tmp_path / "s")
    rows = np.append(np.arange(LENGTH), 7)
    np.testing.assert_array_equal(total(store, "scores", rows), values[rows].sum(0))


def test_a_column_is_read_from_its_block_alone(tmp_path):
    store, values = make(tmp_path / "s")
    fill(store, values, skip=[0])
    np.testing.assert_array_equal(column(store, "scores", 10), values[:, 10])
    with pytest.raises(ValueError, match=r"block 0 of .* is pending"):
        column(store, "scores", 3)
    with pytest.raises(ValueError, match="expected a position from 0 to 10 along 'target', got 11"):
        column(store, "scores", 11)


def test_every_finite_half_is_widened_exactly():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    np.testing.assert_array_equal(widen(halves), halves.astype(np.float32))


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_halves_are_summed_row_after_row(rows):
    halves = np.random.default_rng(0).normal(size=(rows, 700, 3)).astype(np.float16)
    halves[:, 0] = 2.0**-24
    expected = np.zeros((700, 3), np.float32)
    for row in halves:
        expected += row.astype(np.float32)
    np.testing.assert_array_equal(sum_halves(halves), expected)
    assert sum_halves(halves[:0]).tolist() == np.zeros((700, 3)).tolist()


@pytest.mark.parametrize("compress", [False, True])
def test_a_column_takes_the_memory_of_one_object(tmp_path, compress):
    array = ArraySpec(("train", "target"), (4001, 256), "float32", rows=100, compress=compress)
    spec = StoreSpec("scores", "target", 256, {"scores": array})
    store = Store.create(tmp_path / "s", spec, Provenance({}))
    values = np.random.default_rng(0).normal(size=array.shape).astype(np.float32)
    store.write_block(0, {"scores": values})
    column(store, "scores", 0)
    tracemalloc.start()
    found = column(store, "scores", 255)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(found, values[:, 255])
    assert peak < values.nbytes / 4


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("axes", [("train", "target", None), ("target", "train", None)])
def test_columns_of_blocks_of_several_objects(tmp_path, axes, compress):
    shape = tuple({"train": 11, "target": 7, None: 2}[axis] for axis in axes)
    array = ArraySpec(axes, shape, "int16", rows=4, compress=compress)
    line = ArraySpec(("target",), (7,), "int16", compress=compress)
    spec = StoreSpec("scores", "target", 3, {"scores": array, "line": line})
    store = Store.create(tmp_path / "s", spec, Provenance({}))
    values, axis = np.arange(154, dtype=np.int16).reshape(shape), axes.index("target")
    for block in range(3):
        cut = np.r_[spec.span(block)]
        store.write_block(block, {"scores": values.take(cut, axis), "line": cut.astype(np.int16)})
    for position in range(7):
        expected = values.take(position, axis)
        np.testing.assert_array_equal(column(store, "scores", position), expected)
        assert column(store, "line", position) == position
    lost = "scores/c/2/1/0" if axis else "scores/c/1/2/0"
    store.place.remove(lost)
    close_files(store.path)
    with pytest.raises(ValueError, match=f"{lost} is missing; discard block 1"):
        column(store, "scores", 4)
