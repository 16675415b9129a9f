"""Two writers at once on one store: real processes, started at the same moment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stores import ArraySpec, Provenance, Store, StoreSpec, in_turns
from stores.turns import turn

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = 9

# Values are of no seed: a block that two writers shared would not pass its checksum.
DRIVER = """
import os
import sys
import time
from pathlib import Path

import numpy as np

from stores import ArraySpec, Provenance, Store, StoreSpec, in_turns, run_blocks

folder, me, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
arrays = {
    "scores": ArraySpec(("train", "target"), (200, 27), "float32", rows=50),
    "writer": ArraySpec(("target",), (27,), "int64"),
}
(folder / f"ready-{me}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.001)
spec = StoreSpec("scores", "target", 3, arrays)
store = Store.open_or_create(folder / "store", spec, Provenance({"seed": 0}))


def work(block):
    with open(folder / "log", "a") as file:
        file.write(f"{block} {me}\\n")
    time.sleep(0.05)
    values = np.random.default_rng().normal(size=(200, 3)).astype("float32")
    store.write_block(block, {"scores": values, "writer": np.full(3, os.getpid())})


run_blocks(in_turns(work, store), store.pending(), title="scoring", workers=workers)
store.finalize()
"""


def logged(folder):
    return [line.split() for line in (folder / "log").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_drivers_share_a_store_and_repeat_no_block(tmp_path, workers):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    drivers = [
        subprocess.Popen(
            [sys.executable, script, tmp_path, me, str(workers)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
        )
        for me in ("a", "b")
    ]
    assert [driver.communicate(timeout=100)[1] for driver in drivers] == [b"", b""]
    assert [driver.returncode for driver in drivers] == [0, 0]
    store = Store.open(tmp_path / "store")
    assert (store.pending(), store.verify()) == ([], [])
    assert sorted(int(block) for block, _ in logged(tmp_path)) == list(range(BLOCKS))
    left = [path.name for path in (tmp_path / "store").rglob("*") if "." in path.name[1:]]
    assert set(left) == {"zarr.json"}
    # Workers wrote their blocks, all three rows of one by one process, and no driver did.
    writers = {tuple(store.numpy("writer", block)) for block in range(BLOCKS)}
    assert all(len(set(rows)) == 1 for rows in writers)
    if workers:
        assert {driver.pid for driver in drivers}.isdisjoint({rows[0] for rows in writers})


@pytest.fixture
def store(tmp_path):
    spec = StoreSpec("masks", "model", 1, {"mask": ArraySpec(("model",), (3,), "bool")})
    return Store.create(tmp_path / "masks", spec, Provenance({}))


def locks(store):
    return sorted(path.name for path in Path(store.path, "done").glob("*.lock.partial"))


def test_the_turn_of_a_failed_block_is_given_on(store):
    with pytest.raises(OSError, match="disk full"), turn(store.path, 1):
        raise OSError("disk full")
    with turn(store.path, 1) as pending:
        assert pending
        store.write_block(1, {"mask": np.ones(1, bool)})
        assert locks(store) == ["1.lock.partial"]
    assert locks(store) == []
    with turn(store.path, 1) as pending:
        assert not pending
    assert locks(store) == []


def test_the_turn_of_a_killed_process_is_given_on(store):
    hold = (
        "import sys, time; from stores.turns import turn\n"
        "with turn(sys.argv[1], 0): print('mine', flush=True); time.sleep(100)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, store.path], stdout=subprocess.PIPE)
    with holder, holder.stdout:
        assert holder.stdout.readline() == b"mine\n"
        ran = []
        work = in_turns(ran.append, store)
        work(1)
        assert ran == [1]
        holder.kill()
        work(0)
    assert ran == [1, 0]


def test_a_block_of_several_stores_is_looked_up_in_its_own(store, tmp_path):
    other = Store.create(tmp_path / "other", store.spec, Provenance({}))
    other.write_block(1, {"mask": np.ones(1, bool)})
    ran = []
    work = in_turns(ran.append, store, other)
    for number in range(6):
        work(number)
    assert ran == [0, 1, 2, 3, 5]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(store):
    work = in_turns(pytest.fail, store)
    shutil.rmtree(store.path)
    with pytest.raises(FileNotFoundError, match=r"0\.lock"):
        work(0)
