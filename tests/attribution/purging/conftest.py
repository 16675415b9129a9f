"""A run before and after a purge, made once for all tests; whoever changes one makes a copy."""

import pytest

from attribution.purging.purge import purge
from attribution.run import Run
from tests.attribution.purging.runs import (
    SPEC,
    copied,
    opened,
    plain_named_run,
    whole_run,
)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return Run.open(whole_run(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return Run.open(plain_named_run(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="session")
def done(whole, tmp_path_factory):
    path = copied(whole.path.url, tmp_path_factory.mktemp("purged"))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    told = purge(path, SPEC)
    assert told.bytes_before == size
    return path, told


@pytest.fixture(scope="session")
def left(done):
    return opened(done[0])
