"""Worker processes on this machine: started once, kept for later calls, gone with the driver."""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

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
_clients: dict[tuple[int, tuple[str, ...] | None, tuple[str, ...]], Client] = {}


class LocalWorker(ProcessInterface):
    """A worker in a process of its own that never imports the user's script.

    Args:
        scheduler: Address of the scheduler, in the driver's process.
        name: Name of the worker.
        gpu: The one GPU that it sees, as in CUDA_VISIBLE_DEVICES; None leaves it those it has.
    """

    def __init__(self, scheduler: str, name: int, gpu: str | None = None) -> None:
        """Hold the address; `start` starts the process."""
        super().__init__(scheduler=scheduler, name=name)
        self.command = _command(scheduler, name, gpu)
        self.environment = _environment(gpu)
        self.turn = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start the process."""
        self.process = self._started()
        threading.Thread(target=self._keep, args=[self.process], daemon=True).start()
        await super().start()

    async def close(self) -> None:
        """Kill the process and whatever it started."""
        with self.turn:
            process, self.process = self.process, None
        if process is not None:
            _kill(process)
        await super().close()

    def _started(self) -> subprocess.Popen[bytes]:
        # A session of its own keeps Ctrl-C for the driver, which then stops the workers.
        return subprocess.Popen(
            self.command, env=self.environment, stdin=subprocess.PIPE, start_new_session=True
        )

    def _keep(self, process: subprocess.Popen[bytes]) -> None:
        # The process restarts a worker that dies, but none that dies while it starts; and it may
        # be killed itself.
        while True:
            process.wait()
            with self.turn:
                if self.process is None:
                    return
                _kill(process)
                self.process = process = self._started()


def _kill(process: subprocess.Popen[bytes]) -> None:
    # Children may be left where the process itself is gone.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        process.stdin.close()
    process.wait()


def local_client(workers: int | None, gpus: Sequence[str] | None = None) -> Client:
    """Give a client of local worker processes, started on first use.

    Args:
        workers: Number of processes, one thread each; None means one per core, or per GPU.
        gpus: Names of GPUs, as in CUDA_VISIBLE_DEVICES, at least one for each process, which
            sees its own alone and declares the dask resource GPU; None for processes without.

    Returns:
        The client; the processes are kept until this process ends, others are wanted, or this
        process may import from folders that they may not.

    Example:
        >>> local_client(1).submit(abs, -2).result()
        2
        >>> stop_local_workers()
    """
    number = workers or (CPU_COUNT if gpus is None else len(gpus))
    names = None if gpus is None else tuple(gpus[:number])
    wanted = number, names, _import_folders()
    if wanted not in _clients or _clients[wanted].status != "running":
        stop_local_workers()
        client = _start(number, names)
        # Starting a scheduler puts its scratch folder among those to import from.
        _clients[number, names, _import_folders()] = client
        return client
    return _clients[wanted]


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


def _start(number: int, gpus: tuple[str, ...] | None) -> Client:
    # Closing tells the user of lost connections otherwise; blocks that fail are reported anyway.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    cluster = SpecCluster(
        workers={
            index: {"cls": LocalWorker, "options": {"gpu": gpus[index] if gpus else None}}
            for index in range(number)
        },
        scheduler={"cls": "distributed.Scheduler", "options": _scheduler_options()},
        silence_logs=logging.CRITICAL,
        name="stores",
    )
    # A user's own dask computations stay where they were.
    client = Client(cluster, set_as_default=False)
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


def _command(scheduler: str, name: int, gpu: str | None) -> list[str]:
    options = {
        # SpecCluster would give a worker up for lost that it knows by name and misses for a while.
        "name": f"local-{name}",
        "nthreads": 1,
        "resources": {} if gpu is None else {"GPU": 1},
        "host": "127.0.0.1",
        "dashboard": False,
        # The share of one worker is too little for one large block among small ones.
        "memory_limit": 0,
        "silence_logs": logging.CRITICAL,
    }
    spec = json.dumps({"cls": "distributed.Nanny", "opts": options})
    return [sys.executable, "-m", "stores.guard", scheduler, "--spec", spec]


def _environment(gpu: str | None) -> dict[str, str]:
    return {
        **_ALLOCATOR,
        **os.environ,
        **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}),
        "PYTHONPATH": os.pathsep.join(_import_folders()),
        # A work function may start processes itself, such as those of a data loader.
        "DASK_DISTRIBUTED__WORKER__DAEMON": "False",
        "DASK_LOGGING__DISTRIBUTED": "critical",
    }


def _import_folders() -> tuple[str, ...]:
    return tuple(os.path.abspath(folder) for folder in sys.path)
