import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.small_runs import TASK, arrays, write_task
from unlearning.cli import main

ROOT = Path(__file__).parents[2]
MODELS, SUBSETS, PATIENCE = 8, 10, 120
SIZES = ["--full-models", str(MODELS), "--subset-models", str(SUBSETS)]
ENSEMBLES = [*SIZES, "--newton-checkpoints", "0"]  # no gradients, which come after what is killed

SLOW = (
    TASK
    + """
import sibling_of_the_slow_task


def train(indices, seed, device):
    sibling_of_the_slow_task.dawdle()
    torch.manual_seed(seed)
    model = mlp()
    inputs, labels = (tensor[indices] for tensor in train_data.tensors)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model.state_dict()


task = Task("slow", train_data, blobs(11, 2), mlp, train=train)
"""
)

# A process trains two models and then hangs, so that it is always hit in the middle of a block.
SIBLING = """
import itertools
import time
from pathlib import Path

calls = itertools.count(1)


def dawdle():
    if Path(__file__).with_name("slowly").exists() and next(calls) > 2:
        time.sleep(100)
"""


@pytest.fixture
def slow(tmp_path):
    """The spec of a task whose models train for ever while the file `slowly` is there."""
    (tmp_path / "sibling_of_the_slow_task.py").write_text(SIBLING)
    (tmp_path / "slowly").touch()
    return write_task(tmp_path, SLOW, "slow.py")


def marks(run):
    found = run.glob("full/done/c/*")
    # What is being written has a longer name until it is renamed.
    return {path.name: path.stat().st_mtime_ns for path in found if path.name.isdecimal()}


@contextmanager
def started(*words):
    """The command line in a process of its own, ended whatever happens."""
    command = [sys.executable, "-m", "unlearning.cli", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_blocks(run, count, process):
    end = time.monotonic() + PATIENCE
    while len(marks(run)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)


def without_interruption(slow, folder):
    """What the same command makes in one go."""
    assert main(["precompute", slow, "--run", str(folder), *ENSEMBLES, "--workers", "0"]) == 0
    return arrays(folder)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_at_once_in_one_line_and_the_same_command_finishes(slow, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["precompute", slow, "--run", str(run), *ENSEMBLES, "--workers", "0"]
    with started(*words) as process:
        wait_for_blocks(run, 2, process)
        process.send_signal(signal.SIGINT)
        stopped = time.monotonic()
        out, err = process.communicate(timeout=PATIENCE)
        assert time.monotonic() - stopped < 10
    assert (process.returncode, out) == (130, "")
    assert err == "dmm: stopped; what is finished is kept, the same command resumes\n"
    kept = marks(run)
    assert len(kept) == 2
    (tmp_path / "slowly").unlink()
    assert main(words) == 0
    assert "8 full models" in capsys.readouterr().out
    assert marks(run).items() > kept.items()
    assert arrays(run) == without_interruption(slow, tmp_path / "whole")


READING = """
import asyncio, sys, time
import zarr
from zarr.core import sync
from unlearning import cli

def stopped_while_reading(options):
    zarr.open_group(zarr.storage.MemoryStore(), mode="w")  # starts zarr's loop
    asyncio.run_coroutine_threadsafe(asyncio.sleep(60), sync._get_loop())
    time.sleep(0.1)
    raise KeyboardInterrupt

cli.VERBS["status"] = stopped_while_reading
sys.exit(cli.main(["status", "--run", "any"]))
"""


def test_reads_that_ctrl_c_gives_up_are_not_told_of():
    words = [sys.executable, "-c", READING]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (130, "")
    assert found.stderr == "dmm: stopped; what is finished is kept, the same command resumes\n"


def test_a_killed_run_resumes_to_the_same_bits_and_repeats_no_block(slow, tmp_path):
    run = tmp_path / "run"
    words = ["precompute", slow, "--run", str(run), *ENSEMBLES]
    with started(*words, "--workers", "2") as process:
        wait_for_blocks(run, 4, process)
        process.kill()
        process.communicate()
    kept = marks(run)
    assert len(kept) == 4
    (tmp_path / "slowly").unlink()
    assert main([*words, "--workers", "0"]) == 0
    assert marks(run).items() > kept.items()
    assert arrays(run) == without_interruption(slow, tmp_path / "whole")


def test_two_commands_at_once_fill_one_run_together(tmp_path):
    spec, run = write_task(tmp_path), tmp_path / "run"
    rest = [*SIZES, "--newton-checkpoints", "2", "--workers", "0"]
    words = ["precompute", spec, "--run", str(run), *rest]
    with started(*words) as first, started(*words) as second:
        for process in (first, second):
            err = process.communicate(timeout=PATIENCE)[1]
            assert (process.returncode, err) == (0, "")
    assert main(["status", "--run", str(run), "--verify"]) == 0
    assert main(["precompute", spec, "--run", str(tmp_path / "one"), *rest]) == 0
    assert arrays(run) == arrays(tmp_path / "one")
