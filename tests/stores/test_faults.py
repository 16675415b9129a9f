"""Faults of the disk, on a small file system that really fills up and really is locked."""

import errno
import subprocess

import numpy as np
import pytest

from stores import ArraySpec, BlocksFailed, Provenance, Store, StoreSpec, gather, run_blocks
from stores.handles import close_files

SPEC = StoreSpec("a", "model", 4, {"a": ArraySpec(("model", "feature"), (39, 4000), "float32")})


def values(block):
    shape = SPEC.block_shape("a", block)
    return np.random.default_rng(block).normal(size=shape).astype(np.float32)


@pytest.fixture
def disk(tmp_path):
    """A file system that holds four blocks of the store."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a file system: {error}")
    yield folder
    close_files(str(folder / "s"))
    # Lazily: a test that fails may still hold a file open, and must not leave the mount behind.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_loses_nothing_that_is_marked(disk):
    store = Store.create(disk / "s", SPEC, Provenance({}))
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(100_000))

    def work(block):
        store.write_block(block, {"a": values(block)})

    with pytest.raises(BlocksFailed, match=r"No space left on device; finished blocks are kept"):
        run_blocks(work, store.pending(), title="writing", workers=0, retries=0)
    done = store.done()
    assert 0 < len(done) < 4
    assert store.verify() == []
    np.testing.assert_array_equal(store.numpy("a", done[-1]), values(done[-1]))
    ballast.unlink()
    store.write_block(store.pending()[0], {"a": values(store.pending()[0])})
    assert len(store.done()) == len(done) + 1
    assert store.verify() == []


def test_a_full_disk_refuses_a_new_store_and_leaves_nothing(disk):
    (disk / "ballast").write_bytes(bytes(300 * 1024))
    with pytest.raises(ValueError, match=r"cannot write .*/s: .*No space left on device"):
        Store.create(disk / "s", SPEC, Provenance({}))
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_a_locked_disk_is_read_and_not_written(disk):
    store = Store.create(disk / "s", SPEC, Provenance({}))
    store.write_block(2, {"a": values(2)})
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    again = Store.open(disk / "s")
    np.testing.assert_array_equal(gather(again, "a", np.array([9, 8])), values(2)[[1, 0]])
    assert again.verify() == []
    with pytest.raises(OSError, match="Read-only file system") as caught:
        again.write_block(0, {"a": values(0)})
    assert caught.value.errno == errno.EROFS
    assert again.done() == [2]
    with pytest.raises(ValueError, match=r"cannot write .*Read-only file system.*; give a folder"):
        Store.create(disk / "t", SPEC, Provenance({}))


def test_a_complete_store_on_a_locked_disk_is_finalised_again(disk):
    spec = StoreSpec("a", "model", 4, {"a": ArraySpec(("model",), (5,), "float32")})
    store = Store.create(disk / "s", spec, Provenance({}))
    for block in store.pending():
        store.write_block(block, {"a": np.ones(spec.block_shape("a", block), np.float32)})
    store.finalize()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert Store.open(disk / "s").finalize().complete
