"""The process of one local worker: it kills itself and its children when the driver is gone."""

from __future__ import annotations

import os
import signal
import sys
import threading

from distributed.cli.dask_spec import main


def watch_driver() -> None:
    """Wait until the driver's end of standard input closes, then kill this session."""
    # The driver never writes, so reading ends when it ends, by kill -9 too. A worker that computes
    # would not notice for minutes.
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=watch_driver, daemon=True).start()
    try:
        main()
    except Exception as error:
        # The driver starts another one. Python itself cannot end while the thread above reads.
        print(f"a worker process did not start: {error.__cause__ or error}", file=sys.stderr)
        os._exit(1)
