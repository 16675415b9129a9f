"""One thread, one seed and no deadlines: the same numbers on a busy machine as on an idle one."""

import os
import signal
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

from tests import s3_server

# Worker processes are kept from one test to the next: one process of pytest starts them once.
WORKERS = {
    "test_cifar",
    "test_effects",
    "test_ensemble",
    "test_factored_features",
    "test_features",
    "test_fitting",
    "test_in_run",
}
# Few tests that take long: begun last, such a file leaves the other process idle.
LONG = {
    "test_cli_damaged",
    "test_cli_interrupted",
    "test_cli_purge",
    "test_interrupted_purge",
    "test_jobs",
    "test_kill_rounds",
    "test_precompute",
    "test_run_in_bucket",
    *WORKERS,
}

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)

hypothesis.settings.register_profile("shared_machine", deadline=None, derandomize=True)
hypothesis.settings.load_profile("shared_machine")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With --dist loadfile, files that share what is costly to make go to the same process."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return _shared(Path(file)) or file

    return Together(config, log)


def _shared(file):
    if file.stem in WORKERS:
        return "workers"
    purges = file.match("tests/attribution/purging/*") or file.stem == "test_cli_purge"
    return "purges" if purges else None


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def import_folders(tmp_path_factory):
    """A test's task files leave their folders importable: later tests would start new workers."""
    yield
    base = str(tmp_path_factory.getbasetemp())
    sys.path[:] = [folder for folder in sys.path if not folder.startswith(base)]


@pytest.fixture(scope="session")
def s3_endpoint():
    """Address of an S3 server that runs as long as the tests."""
    try:
        s3_server.environment()
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    with s3_server.serving() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint, monkeypatch):
    """Address of a bucket of its own; the environment tells how to reach it."""
    s3_server.use(s3_endpoint, monkeypatch)
    return s3_server.make_bucket(s3_endpoint)


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts, also where the suite runs as a background job, whose shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
