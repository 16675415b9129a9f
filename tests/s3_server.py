"""A real S3 server on this machine, in a process and an environment of its own.

Run as a script, it makes the environment: the server's packages do not go with ours.
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PINS = Path(__file__).with_name("s3_server.txt")
ENVIRONMENT = PINS.parent.parent / ".cache" / "s3-server"
_NUMBERS = itertools.count()
# It ends with its standard input, so when the tests are killed too.
SERVE = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


def environment() -> Path:
    """The folder of the server's environment, made if it is missing or of other versions."""
    made_of = ENVIRONMENT / "made-of.txt"
    if not made_of.exists() or made_of.read_text() != PINS.read_text():
        ENVIRONMENT.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ENVIRONMENT.parent) as folder:
            aside = Path(folder, "made")
            _run(sys.executable, "-m", "venv", aside)
            _run(aside / "bin" / "python", "-m", "pip", "install", "--retries", "1", "-r", PINS)
            (aside / made_of.name).write_text(PINS.read_text())
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            aside.rename(ENVIRONMENT)
    return ENVIRONMENT


@contextmanager
def serving() -> Iterator[str]:
    """Serve as long as the context lasts; gives the address of the server."""
    command = [environment() / "bin" / "python", "-c", SERVE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.stdin.close()


def use(endpoint: str, patch: pytest.MonkeyPatch) -> None:
    """Set the variables that a process needs to reach the server, and no others."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in settings.items():
        patch.setenv(name, value)


def make_bucket(endpoint: str) -> str:
    """Make a bucket; gives its address."""
    name = f"bucket-{next(_NUMBERS)}"
    request = urllib.request.Request(f"{endpoint}/{name}", method="PUT")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request):
        return f"s3://{name}"


def _run(*command: object) -> None:
    words = list(map(str, command))
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OSError(f"cannot make the environment of the S3 server: {last}")


if __name__ == "__main__":
    try:
        environment()
    except OSError as error:
        sys.exit(str(error))
