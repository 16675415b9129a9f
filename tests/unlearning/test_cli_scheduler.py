"""The command line against a scheduler that runs elsewhere."""

import distributed
import pytest
from distributed.diagnostics.plugin import SchedulerPlugin

from tests.small_runs import arrays, write_task
from unlearning.cli import main

SIZES = ("--full-models", "4", "--subset-models", "12", "--newton-checkpoints", "0")


class Noting(SchedulerPlugin):
    """Notes the blocks that a worker finished."""

    def __init__(self):
        self.finished = []

    def transition(self, key, start, finish, *args, **kwargs):
        if (start, finish) == ("processing", "memory"):
            self.finished.append(str(key))


@pytest.fixture
def cluster():
    options = {"host": "127.0.0.1", "dashboard_address": None, "silence_logs": 50}
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, **options
    ) as cluster:
        yield cluster


def test_precompute_runs_on_an_existing_scheduler(cluster, tmp_path, capsys):
    noting = Noting()
    cluster.scheduler.add_plugin(noting)
    spec, run = write_task(tmp_path), tmp_path / "run"
    address = cluster.scheduler_address
    assert address.startswith("tcp://")
    words = ["precompute", spec, *SIZES, "--run"]
    assert main([*words, str(run), "--scheduler", address]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{run}: 4 full models, 12 models on mixed subsets, datamodels of 48")
    assert err == ""
    names = {"-".join(key.split("-")[:2]) for key in noting.finished}
    assert len(names) >= 3, "full models, subset models and datamodels"
    assert main([*words, str(tmp_path / "here"), "--workers", "0"]) == 0
    assert arrays(run) == arrays(tmp_path / "here")
    assert main(["predict", "--run", str(run), "--forget", "rows:3:8"]) == 0
    assert main(["status", "--run", str(run), "--verify"]) == 0


def test_workers_with_several_threads_are_bad_input(tmp_path, capsys):
    options = {"host": "127.0.0.1", "dashboard_address": None, "silence_logs": 50}
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=True, **options
    ) as cluster:
        words = ["precompute", write_task(tmp_path), *SIZES, "--run", str(tmp_path / "run")]
        assert main([*words, "--scheduler", cluster.scheduler_address]) == 2
    assert "expected workers with one thread each, got 2 threads" in capsys.readouterr().err
