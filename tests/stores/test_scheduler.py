"""Blocks on a scheduler that runs elsewhere: what is killed, cancelled, refused and reported."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import dask
import distributed
import pytest

from stores import (
    BlockCancelled,
    BlocksFailed,
    advance,
    cancelling,
    jobs,
    pickle_by_value,
    run_blocks,
)
from stores.progress import Progress
from stores.sent import _Reporting
from stores.tasks import Tasks

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60
pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

CONFIG = {
    "distributed.scheduler.allowed-failures": 1,
    # LocalCluster would take workers that are restarted twice for lost.
    "distributed.deploy.lost-worker-timeout": "1 hour",
}


@pytest.fixture(scope="module")
def address():
    options = {"host": "127.0.0.1", "dashboard_address": None, "silence_logs": 50}
    with (
        dask.config.set(CONFIG),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, **options) as cluster,
    ):
        yield cluster.scheduler_address


def in_process(workers):
    """A scheduler and workers in this process, by their options; no nanny watches them."""
    specs = {
        name: {"cls": distributed.Worker, "options": {"nthreads": 1, **options}}
        for name, options in workers.items()
    }
    quiet = {"dashboard": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}
    scheduler = {"cls": distributed.Scheduler, "options": {**quiet, "port": 0}}
    return distributed.SpecCluster(workers=specs, scheduler=scheduler, silence_logs=50)


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(process):
    return Path(f"/proc/{process}").exists()


class Endless:
    """Notes its process and computes for ever; it may look whether it is cancelled."""

    def __init__(self, folder, *, looks):
        self.folder, self.looks = Path(folder), looks

    def __call__(self, block):
        (self.folder / f"process-{os.getpid()}").touch()
        try:
            while True:
                time.sleep(0.01)
                if self.looks:
                    advance()
        except BlockCancelled:
            (self.folder / f"cancelled-{os.getpid()}").touch()
            raise

    def noted(self, kind):
        return {int(path.name.split("-")[1]) for path in self.folder.glob(f"{kind}-*")}


def test_a_block_that_kills_its_worker_is_listed_while_others_go_on(address, tmp_path):
    def work(block):
        if block == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / str(block)).touch()

    with pytest.raises(BlocksFailed, match="block 3 failed, first with KilledWorker") as caught:
        run_blocks(work, range(8), title="killing", scheduler=address)
    assert list(caught.value.failed) == [3]
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [*range(3), *range(4, 8)]


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("looks", [True, False], ids=["looks", "deaf"])
def test_ctrl_c_ends_the_work_and_spares_workers_that_stop_by_themselves(
    address, tmp_path, monkeypatch, looks
):
    work = Endless(tmp_path, looks=looks)
    # Whom to stop does not hang on reports, which may come late.
    monkeypatch.setattr(Tasks, "hear", lambda self, event: None)

    def interrupt():
        try:
            wait_until(lambda: len(work.noted("process")) == 2)
        finally:  # or the work would never end where only one worker takes it up
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_blocks(work, range(5), title="endless", scheduler=address)
    processes = work.noted("process")
    assert len(processes) == 2, "blocks that waited were started"
    assert work.noted("cancelled") == (processes if looks else set())
    assert {alive(process) for process in processes} == {looks}
    run_blocks(Touch(tmp_path), range(3), title="after", scheduler=address)
    assert len(list(tmp_path.glob("touched-*"))) == 3


def test_the_step_at_which_a_task_is_cancelled_is_the_last_and_reports_nothing():
    sent, task = [], SimpleNamespace(state="executing")
    worker = SimpleNamespace(
        state=SimpleNamespace(tasks={"key": task}),
        get_current_task=lambda: "key",
        log_event=lambda topic, told: sent.append(told),
    )
    reporting = _Reporting(worker, "work", 0)
    reporting(0.25)
    assert [told["event"] for told in sent] == ["advances"]
    task.state, reporting.next = "cancelled", 0.0  # the next report would be due
    with pytest.raises(BlockCancelled):
        reporting(0.25)
    assert len(sent) == 1


def test_who_does_not_stop_by_himself_is_restarted_within_ten_seconds():
    assert cancelling._GRACE + cancelling._RESTART <= 10


class Touch:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, block):
        (self.folder / f"touched-{block}").touch()


def test_bad_input_in_one_block_ends_the_others(address, tmp_path):
    endless = Endless(tmp_path, looks=True)

    def work(block):
        if block == 0:
            wait_until(lambda: endless.noted("process"))
            raise ValueError("no such row")
        endless(block)

    with pytest.raises(ValueError, match="no such row"):
        run_blocks(work, range(5), title="endless", scheduler=address)
    assert endless.noted("cancelled") == endless.noted("process")


DRIVER = """
import sys
import time
from pathlib import Path

from stores import BlockCancelled, advance, run_blocks

address, folder = sys.argv[1], Path(sys.argv[2])


def work(block):
    (folder / f"began-{block}").touch()
    try:
        while True:
            time.sleep(0.01)
            advance()
    except BlockCancelled:
        (folder / f"cancelled-{block}").touch()
        raise


run_blocks(work, range(2), title="endless", scheduler=address)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_work_ends_with_its_driver(address, tmp_path, number):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, address, tmp_path]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as driver:
        wait_until(lambda: len(list(tmp_path.glob("began-*"))) == 2)
        driver.send_signal(number)
        assert driver.communicate(timeout=PATIENCE)[1] == b""
    assert driver.returncode == -number
    wait_until(lambda: len(list(tmp_path.glob("cancelled-*"))) == 2)


def test_sigterm_keeps_a_handler_of_the_users(address, tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        run_blocks(Touch(tmp_path), [0], title="a", scheduler=address)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    run_blocks(Touch(tmp_path), [0], title="a", scheduler=address)
    assert signal.getsignal(signal.SIGTERM) is before


def test_workers_without_a_nanny_are_left_and_named():
    begun, released = threading.Event(), threading.Event()

    def work(block):
        if block == 0:
            begun.set()
            assert released.wait(PATIENCE)
        else:
            assert begun.wait(PATIENCE)
            raise ValueError("no such row")

    with in_process({0: {}, 1: {}}) as cluster:
        HERE["work"] = work
        try:
            with (
                pytest.warns(UserWarning, match="have no nanny .* goes on with its block"),
                pytest.raises(ValueError, match="no such row"),
            ):
                run_blocks(here, [0, 1], title="a", scheduler=cluster.scheduler_address)
        finally:
            released.set()


HERE = {}


def here(block):
    """Work of this very process: pickled as a name, it keeps its events."""
    sys.modules["tests_here"].HERE["work"](block)


sys.modules["tests_here"] = sys.modules[__name__]


def test_workers_with_several_threads_are_refused(tmp_path):
    message = r"one thread each, got 2 threads at .*; start them with dask worker --nthreads 1"
    with (
        in_process({0: {"nthreads": 2}}) as cluster,
        pytest.raises(ValueError, match=message),
    ):
        run_blocks(Touch(tmp_path), range(3), title="a", scheduler=cluster.scheduler_address)
    assert list(tmp_path.iterdir()) == []


class Named:
    """Notes the name of its worker."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, block):
        from distributed import get_worker

        time.sleep(0.05)
        (self.folder / f"{get_worker().name}-{block}").touch()


@pytest.mark.parametrize("declared", [True, False])
def test_blocks_that_need_a_gpu_go_to_workers_that_declare_one(tmp_path, declared):
    resources = {"resources": {"GPU": 1}} if declared else {}
    with in_process({"plain": {}, "gpu": resources}) as cluster:
        address = cluster.scheduler_address
        run_blocks(Named(tmp_path), range(8), title="a", scheduler=address, gpus=[])
    used = {path.name.split("-")[0] for path in tmp_path.iterdir()}
    assert used == ({"gpu"} if declared else {"gpu", "plain"})
    assert len(list(tmp_path.iterdir())) == 8


class Quarters:
    def __call__(self, block):
        for _ in range(3):
            advance(0.25)


class Noting(Progress):
    """Notes the shares that it is told."""

    shares: dict = {}  # noqa: RUF012 - of the one that a test reads

    def add(self, block, share):
        Noting.shares[block] = Noting.shares.get(block, 0) + share
        super().add(block, share)


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_workers_report_how_far_a_block_is(address, monkeypatch, where):
    Noting.shares = {}
    monkeypatch.setattr(jobs, "Progress", Noting)
    place = {"workers": 0} if where == "here" else {"scheduler": address}
    run_blocks(Quarters(), range(4), title="a", **place)
    wait_until(lambda: Noting.shares == dict.fromkeys(range(4), 0.75))


def test_threads_that_are_not_main_leave_signals_alone(address, tmp_path):
    failed = []

    def call():
        try:
            run_blocks(Touch(tmp_path), [0], title="a", scheduler=address)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(PATIENCE)
    assert (failed, (tmp_path / "touched-0").exists()) == ([], True)
