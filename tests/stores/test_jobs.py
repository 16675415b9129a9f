import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import dask
import numpy as np
import pytest

from stores import (
    ArraySpec,
    BlockFailed,
    BlocksFailed,
    Provenance,
    Store,
    StoreSpec,
    pickle_by_value,
    run_blocks,
    workers,
)
from stores.jobs import _describe
from stores.writing import BlockDone

ROOT = Path(__file__).resolve().parents[2]
pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
# The tests stand in an order in which the number of workers seldom changes: others are started.


@pytest.fixture(scope="module", autouse=True)
def _no_workers_left():
    yield
    workers.stop_local_workers()


class Append:
    """Appends its block to a file, and fails for some."""

    def __init__(self, path, fail=None, error=OSError, times=10**6):
        self.path, self.fail, self.error, self.times = str(path), fail, error, times

    def __call__(self, block):
        with open(self.path, "a") as file:
            file.write(f"{block}\n")
        if block == self.fail and blocks_in(self.path).count(block) <= self.times:
            raise self.error(f"no block {block}")


def blocks_in(path):
    return [int(line) for line in Path(path).read_text().split()]


@pytest.fixture(params=[0, 2], ids=["here", "workers"])
def number(request):
    return request.param


def test_every_block_runs_once(tmp_path, number):
    run_blocks(Append(tmp_path / "log"), range(7), title="appending", workers=number)
    assert sorted(blocks_in(tmp_path / "log")) == list(range(7))


def test_no_blocks_start_nothing():
    run_blocks(Append("nowhere"), [], title="nothing")


def test_a_raising_block_is_retried_and_listed_while_others_go_on(tmp_path, number):
    work = Append(tmp_path / "log", fail=3)
    message = "appending: block 3 failed, first with OSError: no block 3; finished blocks are kept"
    with pytest.raises(BlocksFailed, match=message) as caught:
        run_blocks(work, range(6), title="appending", workers=number, retries=2)
    assert caught.value.failed == {3: "OSError: no block 3"}
    assert sorted(blocks_in(tmp_path / "log")) == [0, 1, 2, 3, 3, 3, 4, 5]


def test_a_block_that_succeeds_when_retried_is_no_failure(tmp_path, number):
    run_blocks(Append(tmp_path / "log", fail=1, times=1), [0, 1], title="a", workers=number)
    assert sorted(blocks_in(tmp_path / "log")) == [0, 1, 1]


def test_a_block_that_is_done_already_is_no_failure(tmp_path, number):
    work = Append(tmp_path / "log", fail=1, error=BlockDone)
    run_blocks(work, [0, 1], title="a", workers=number)
    assert sorted(blocks_in(tmp_path / "log")) == [0, 1]


def test_a_block_that_cannot_be_computed_is_listed_and_not_tried_again(tmp_path, number):
    work = Append(tmp_path / "log", fail=3, error=BlockFailed)
    with pytest.raises(BlocksFailed, match="block 3 failed, first with no block 3; fin") as caught:
        run_blocks(work, range(6), title="appending", workers=number, retries=2)
    assert caught.value.failed == {3: "no block 3"}
    assert sorted(blocks_in(tmp_path / "log")) == list(range(6))


@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_bad_input_stops_the_run_and_is_raised_as_it_is(tmp_path, number, error):
    with pytest.raises(error, match="no block 2") as caught:
        run_blocks(
            Append(tmp_path / "log", fail=2, error=error), range(99), title="a", workers=number
        )
    assert caught.value.__notes__[0].startswith("raised for block 2:")
    assert blocks_in(tmp_path / "log").count(2) == 1


def test_interrupts_go_through(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_blocks(
            Append(tmp_path / "log", fail=2, error=KeyboardInterrupt),
            range(5),
            title="a",
            workers=0,
        )
    assert blocks_in(tmp_path / "log") == [0, 1, 2]


def test_a_block_that_kills_its_worker_is_listed_while_others_go_on(tmp_path):
    def work(block):
        if block == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / str(block)).touch()

    with pytest.raises(BlocksFailed, match="block 3 failed, first with KilledWorker") as caught:
        run_blocks(work, range(12), title="killing", workers=2)
    assert list(caught.value.failed) == [3]
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [*range(3), *range(4, 12)]


def test_a_worker_that_is_killed_once_costs_nothing(tmp_path):
    def work(block):
        if block == 3 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / str(block)).touch()

    run_blocks(work, range(6), title="killing", workers=2)
    assert len(list(tmp_path.iterdir())) == 7


def test_workers_use_one_thread_and_the_drivers_import_path(tmp_path):
    def work(block):
        names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
        (tmp_path / "seen").write_text(" ".join(os.environ[name] for name in names))
        __import__("stores")

    run_blocks(work, [0], title="looking", workers=2)
    assert (tmp_path / "seen").read_text() == "1 1 1"


def test_blocks_are_written_by_several_workers_and_not_by_the_driver(tmp_path):
    arrays = {"writer": ArraySpec(("model",), (6,), "int64")}
    store = Store.create(tmp_path / "s", StoreSpec("writers", "model", 1, arrays), Provenance({}))

    def work(block):
        (tmp_path / f"process-{os.getpid()}").touch()
        wait_until(lambda: len(list(tmp_path.glob("process-*"))) == 2, 40)
        store.write_block(block, {"writer": np.array([os.getpid()])})

    run_blocks(work, store.pending(), title="writing", workers=2)
    writers = set(store.numpy("writer"))
    assert writers == {int(path.name.split("-")[1]) for path in tmp_path.glob("process-*")}
    assert os.getpid() not in writers


def test_an_existing_scheduler_is_used(tmp_path):
    client = workers.local_client(2)
    run_blocks(
        Append(tmp_path / "log"), range(3), title="a", scheduler=client.scheduler_info()["address"]
    )
    assert sorted(blocks_in(tmp_path / "log")) == [0, 1, 2]
    assert client.status == "running"


def test_each_local_worker_sees_a_gpu_of_its_own(tmp_path):
    def work(block):
        (tmp_path / f"gpu-{os.environ['CUDA_VISIBLE_DEVICES']}").touch()
        wait_until(lambda: len(list(tmp_path.glob("gpu-*"))) == 2, 40)

    run_blocks(work, range(4), title="looking", gpus=["5", "MIG-7"])
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-5", "gpu-MIG-7"}


def test_a_process_that_dies_while_it_starts_is_started_again(tmp_path):
    workers.stop_local_workers()
    client = workers.local_client(1)
    local = client.cluster.workers[0]
    before = local.process
    before.kill()
    before.wait()
    wait_until(lambda: local.process is not before, 40)
    run_blocks(Append(tmp_path / "log"), range(3), title="a", workers=1)
    assert sorted(blocks_in(tmp_path / "log")) == [0, 1, 2]


def test_other_dask_computations_stay_in_this_process():
    workers.local_client(1)
    assert dask.delayed(os.getpid)().compute() == os.getpid()


def test_workers_are_kept_for_the_next_call(tmp_path, monkeypatch):
    def work(_):
        (tmp_path / f"process-{os.getpid()}").touch()

    workers.stop_local_workers()
    for _ in range(2):
        run_blocks(work, range(2), title="looking", workers=1)
    assert len(list(tmp_path.iterdir())) == 1
    # What may be imported here may be imported there.
    monkeypatch.syspath_prepend(tmp_path)
    run_blocks(work, range(2), title="looking", workers=1)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_missing_scheduler_is_refused():
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "100ms"}),
        pytest.raises(
            ValueError, match=r"expected a dask scheduler at tcp://127\.0\.0\.1:9, could not"
        ),
    ):
        run_blocks(print, [0], title="a", scheduler="tcp://127.0.0.1:9")


def test_unusable_arguments_are_refused():
    with pytest.raises(ValueError, match="expected workers or a scheduler, got 2 and tcp:"):
        run_blocks(print, [0], title="a", workers=2, scheduler="tcp:")
    with pytest.raises(ValueError, match="expected 0 or more workers, got -1"):
        run_blocks(print, [0], title="a", workers=-1)
    with pytest.raises(ValueError, match="one visible GPU for each worker, got 1 for 2"):
        run_blocks(print, [0], title="a", workers=2, gpus=["0"])
    with pytest.raises(ValueError, match="one visible GPU for each worker, got 0 for 1"):
        run_blocks(print, [0], title="a", gpus=[])
    with pytest.raises(ValueError, match="expected 0 or more retries, got -1"):
        run_blocks(print, [0], title="a", retries=-1)


def test_errors_are_described_by_type_and_text():
    assert _describe(OSError("disk full")) == "OSError: disk full"


# No guard against being imported: workers must not import the user's script.
DRIVER = """
import os
import sys
import time

import numpy as np

from stores import ArraySpec, Provenance, Store, StoreSpec, run_blocks

folder, seconds, workers = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
arrays = {
    "scores": ArraySpec(("train", "target"), (501, 47), "float32", rows=200),
    "bias": ArraySpec(("target",), (47,), "float64"),
}
spec = StoreSpec("scores", "target", 3, arrays)
store = Store.open_or_create(folder + "/store", spec, Provenance({"seed": 0}))


def work(block):
    with open(folder + "/log", "a") as file:
        file.write(f"{block} {os.getpid()} {os.getppid()}\\n")
    generator = np.random.default_rng([0, block])
    time.sleep(seconds)
    values = {}
    for name, array in arrays.items():
        shape = spec.block_shape(name, block)
        values[name] = generator.normal(size=shape).astype(array.dtype)
    store.write_block(block, values)


run_blocks(work, store.pending(), title="scoring", workers=workers)
store.finalize()
"""


def start(folder, seconds, workers=2):
    folder.mkdir(exist_ok=True)
    script = folder / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    return subprocess.Popen(
        [sys.executable, script, folder, str(seconds), str(workers)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )


def started(folder):
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [tuple(map(int, line.split())) for line in lines]


def alive(process):
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks processes up in /proc")
def test_a_killed_driver_leaves_no_process_and_resumes_bit_identically(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    driver = start(killed, 0.15)
    wait_until(lambda: len(started(killed)) >= 4, 40)
    driver.kill()
    driver.communicate()
    processes = {process for line in started(killed) for process in line[1:]}
    wait_until(lambda: not any(map(alive, processes)), 3)
    store = Store.open(killed / "store")
    assert store.verify() == []
    done, before = set(store.done()), len(started(killed))
    for folder, number in ((killed, 2), (whole, 0)):
        driver = start(folder, 0, number)
        assert driver.communicate(timeout=40)[1] == b""
        assert driver.returncode == 0
    assert done
    assert done.isdisjoint({line[0] for line in started(killed)[before:]})
    stores = [Store.open(folder / "store") for folder in (killed, whole)]
    for name in ("scores", "bias"):
        np.testing.assert_array_equal(*(store.numpy(name) for store in stores))
    assert [store.verify() for store in stores] == [[], []]
