import errno
import os
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stores import ArraySpec, Provenance, Store, StoreSpec, gather, handles
from stores.handles import OpenFiles, close_files, opened_files
from stores.places import place

SPEC = StoreSpec("a", "target", 2, {"a": ArraySpec(("train", "target"), (9, 4), "int16", rows=2)})


def make(path, offset=0):
    store = Store.create(path, SPEC, Provenance({}))
    values = np.arange(36, dtype=np.int16).reshape(9, 4) + offset
    for block in range(2):
        store.write_block(block, {"a": values[:, SPEC.span(block)]})
    return store, values.astype(np.int16)


def test_a_replaced_store_is_read_anew(tmp_path):
    store, values = make(tmp_path / "s")
    rows = np.array([8, 0, 3])
    np.testing.assert_array_equal(gather(store, "a", rows), values[rows])
    other, changed = make(tmp_path / "t", offset=1000)
    place(tmp_path / "s").move(place(tmp_path / "old"))
    place(other.path).move(place(tmp_path / "s"))
    np.testing.assert_array_equal(gather(store, "a", rows), changed[rows])


def test_a_rewritten_block_is_read_anew(tmp_path):
    store, values = make(tmp_path / "s")
    store.finalize()
    rows = np.array([8, 0, 3])
    gather(store, "a", rows)
    store.discard(1)
    with pytest.raises(ValueError, match=r"block 1 of .* is pending"):
        gather(store, "a", rows)
    store.write_block(1, {"a": -values[:, 2:]})
    np.testing.assert_array_equal(gather(store, "a", rows)[:, 2:], -values[rows, 2:])


def test_files_are_closed_when_too_many_or_told(tmp_path, monkeypatch):
    monkeypatch.setattr(handles, "_MOST", 3)
    store, values = make(tmp_path / "s")
    handles._kept.clear()
    before = len(os.listdir("/proc/self/fd"))
    np.testing.assert_array_equal(gather(store, "a", np.arange(9)), values)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    close_files(str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_open_files_of_all_folders_are_counted_together(tmp_path, monkeypatch):
    monkeypatch.setattr(handles, "_MOST", 7)
    stores = [make(tmp_path / str(number), number) for number in range(3)]
    handles._kept.clear()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for store, values in stores:
            np.testing.assert_array_equal(gather(store, "a", np.arange(9)), values)
            assert len(os.listdir("/proc/self/fd")) <= before + 7
    close_files(str(tmp_path))


@pytest.fixture
def few_files():
    """Allows few more open files than there are now; gives back how many."""
    handles._kept.clear()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(more):
        taken = {int(name) for name in os.listdir("/proc/self/fd")}
        free = [number for number in range(limits[0]) if number not in taken]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], limits[1]))

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_batch_of_more_files_than_may_be_open_is_read(tmp_path, few_files):
    names = [str(number) for number in range(150)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes([number, number]))
    few_files(40)
    batches = [{name: [0] for name in names}, {name: [1] for name in names[::-1]}]
    files = opened_files(str(tmp_path), 1)
    found = [batch[:, 0].tolist() for batch in files.read(batches, 2, 1)]
    assert found == [[*range(150)], [*range(149, -1, -1)]]
    close_files(str(tmp_path))


def test_where_the_caller_has_opened_all_files_ours_are_closed(tmp_path, monkeypatch):
    stores = [make(tmp_path / str(number), number) for number in range(2)]
    handles._kept.clear()
    gather(stores[0][0], "a", np.arange(9))
    original, refused = os.open, []

    def full(path, *rest, **named):
        if handles._kept and any(files.files for _, files in handles._kept.values()):
            refused.append(path)
            raise OSError(errno.EMFILE, "Too many open files")
        return original(path, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        np.testing.assert_array_equal(gather(stores[1][0], "a", np.arange(3)), stores[1][1][:3])
    assert refused
    close_files(str(tmp_path))


def test_a_buffer_that_another_thread_takes_is_not_missed(tmp_path):
    class Taken(list):
        def __len__(self):
            return 1

        def pop(self):
            raise IndexError("pop from empty list")

    files = OpenFiles(str(tmp_path))
    files.buffers = Taken()
    assert len(files._take_buffer(3)) == 3


def test_threads_share_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(handles, "_MOST", 3)
    stores = [make(tmp_path / str(number), number) for number in range(3)]

    def read(number):
        store, values = stores[number % 3]
        np.testing.assert_array_equal(gather(store, "a", np.arange(9)), values)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(200)))
    close_files(str(tmp_path))


def test_a_store_without_a_root_keeps_nothing_open(tmp_path):
    (tmp_path / "a").write_bytes(b"1234")
    assert opened_files(str(tmp_path), None) is not opened_files(str(tmp_path), None)


@pytest.mark.parametrize("cold", [0, 1, 2, 3])
def test_what_is_not_in_memory_is_announced_and_waited_for(tmp_path, monkeypatch, cold):
    """The disk is asked from the first range on that is not in memory, and four batches ahead."""
    content = np.random.default_rng(0).integers(0, 256, 600, dtype=np.uint8)
    (tmp_path / "a").write_bytes(content.tobytes())
    batches = [{"a": [60 * batch, 60 * batch + 17]} for batch in range(9)]
    announced, original = [], os.preadv

    def preadv(handle, buffers, start, flags=0):
        if flags and start >= 60 * cold + 17:
            raise BlockingIOError(errno.EAGAIN, "not in memory")
        return original(handle, buffers, start, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, start, *rest: announced.append(start))
    seen = []
    for batch in OpenFiles(str(tmp_path)).read(batches, 600, 13):
        seen.append(batch.copy())
        if len(seen) == cold + 1:
            first = [start for ranges in batches[cold : cold + 4] for start in ranges["a"]]
            assert announced == [0, *first]
    assert announced == [0, *(start for ranges in batches[cold:] for start in ranges["a"])]
    for ranges, found in zip(batches, seen, strict=True):
        for start, row in zip(ranges["a"], found, strict=True):
            np.testing.assert_array_equal(row, content[start : start + 13])


def test_systems_without_quick_reads_announce_everything(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "RWF_NOWAIT")
    (tmp_path / "a").write_bytes(bytes(range(100)))
    batches = [{"a": [10 * batch]} for batch in range(7)]
    announced = []
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, start, *rest: announced.append(start))
    found = [batch.copy() for batch in OpenFiles(str(tmp_path)).read(batches, 100, 2)]
    assert announced == [0, *range(0, 70, 10)]
    assert [row.tolist() for batch in found for row in batch] == [
        [i, i + 1] for i in range(0, 70, 10)
    ]


def test_a_file_that_shrinks_while_it_is_open_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    files = OpenFiles(str(tmp_path))
    next(files.read([{"a": [0]}], 100, 50))
    os.truncate(tmp_path / "a", 60)
    cure = r"expected 100 bytes in .*/a, got 60; dmm status --verify"
    with pytest.raises(ValueError, match=cure):
        next(files.read([{"a": [50]}], 100, 50))


def test_other_errors_of_the_disk_are_raised(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(100))

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OSError, match="Input/output error"):
        next(OpenFiles(str(tmp_path)).read([{"a": [0]}], 100, 50))
