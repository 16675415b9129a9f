"""Worker processes on this machine: started once, kept for later calls, gone with the driver."""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys

from dask.system import CPU_COUNT
from distributed import Client, SpecCluster
from distributed.deploy.spec import ProcessInterface

_START_SECONDS = 120  # a busy machine imports slowly
# distributed's own setting hands every large array back to the system at once, which slows a
# work function made of many array operations. The values are bytes.
_ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
_clients: dict[int, Client] = {}


class LocalWorker(ProcessInterface):
    """A worker in a process of its own that never imports the user's script.

    Args:
        scheduler: Address of the scheduler, in the driver's process.
        name: Name of the worker.
    """

    def __init__(self, scheduler: str, name: int) -> None:
        """Hold the address; `start` starts the process."""
        super().__init__(scheduler=scheduler, name=name)
        self.command = _command(scheduler, name)
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start the process."""
        # A session of its own keeps Ctrl-C for the driver, which then stops the workers.
        self.process = subprocess.Popen(
            self.command, env=_environment(), stdin=subprocess.PIPE, start_new_session=True
        )
        await super().start()

    async def close(self) -> None:
        """Kill the process and whatever it started."""
        if self.process is not None and self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
        await super().close()


def local_client(workers: int | None) -> Client:
    """Give a client of local worker processes, started on first use.

    Args:
        workers: Number of processes, one thread each; None means one per core.

    Returns:
        The client; the processes are kept until this process ends or another number is wanted.

    Example:
        >>> local_client(1).submit(abs, -2).result()
        2
        >>> stop_local_workers()
    """
    number = CPU_COUNT if workers is None else workers
    if number not in _clients or _clients[number].status != "running":
        stop_local_workers()
        _clients[number] = _start(number)
    return _clients[number]


@atexit.register
def stop_local_workers() -> None:
    """Kill the local worker processes, if any, whatever they are doing.

    Example:
        >>> stop_local_workers()
    """
    while _clients:
        _, client = _clients.popitem()
        cluster = client.cluster
        client.close()
        if cluster is not None:
            cluster.close()


def _start(number: int) -> Client:
    # Closing tells the user of lost connections otherwise; blocks that fail are reported anyway.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    cluster = SpecCluster(
        workers={index: {"cls": LocalWorker} for index in range(number)},
        scheduler={"cls": "distributed.Scheduler", "options": _scheduler_options()},
        silence_logs=logging.CRITICAL,
        name="stores",
    )
    client = Client(cluster)
    client.wait_for_workers(1, timeout=_START_SECONDS)
    return client


def _scheduler_options() -> dict[str, object]:
    return {
        "host": "127.0.0.1",
        "port": 0,
        "dashboard": False,
        "dashboard_address": "127.0.0.1:0",
        # A block that lost its worker is tried once more by run_blocks, alone.
        "allowed_failures": 0,
    }


def _command(scheduler: str, name: int) -> list[str]:
    options = {
        "name": name,
        "nthreads": 1,
        "host": "127.0.0.1",
        "dashboard": False,
        # The share of one worker is too little for one large block among small ones.
        "memory_limit": 0,
        "silence_logs": logging.CRITICAL,
    }
    spec = json.dumps({"cls": "distributed.Nanny", "opts": options})
    return [sys.executable, "-m", "stores.guard", scheduler, "--spec", spec]


def _environment() -> dict[str, str]:
    folders = [os.path.abspath(folder) for folder in sys.path]
    return {
        **_ALLOCATOR,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(folders),
        # A work function may start processes itself, such as those of a data loader.
        "DASK_DISTRIBUTED__WORKER__DAEMON": "False",
        "DASK_LOGGING__DISTRIBUTED": "critical",
    }
