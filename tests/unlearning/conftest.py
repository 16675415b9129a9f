"""Models of three blobs, trained once for all tests that need real ones; verbs to run."""

import json

import pytest

from tests.small_runs import copied, finished_run, plain_run
from tests.unlearning.cases import branching, lay_ground, mlp, normalised, three_blobs
from unlearning.cli import main


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    return lay_ground(three_blobs(mlp), tmp_path_factory.mktemp("blobs"))


@pytest.fixture(scope="session")
def normalised_ground(tmp_path_factory):
    return lay_ground(three_blobs(normalised), tmp_path_factory.mktemp("normalised"))


@pytest.fixture(scope="session")
def branching_ground(tmp_path_factory):
    return lay_ground(three_blobs(branching), tmp_path_factory.mktemp("branching"))


@pytest.fixture
def run(tmp_path_factory):
    """A finished run that no test may spoil."""
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the finished run that may be spoiled; its task file lies beside it."""
    return copied(run, tmp_path)


@pytest.fixture
def plain_copy(tmp_path_factory, tmp_path):
    """A copy of a run without gradients."""
    return copied(plain_run(tmp_path_factory.getbasetemp()), tmp_path)


@pytest.fixture
def dmm(capsys):
    """Runs a verb that must succeed without a word on stderr; gives what it printed."""

    def call(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return call


@pytest.fixture
def refused(capsys):
    """The one line that refuses a command for bad input."""

    def call(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("dmm: ")
        assert err.count("\n") == 1
        return err.removeprefix("dmm: ").rstrip("\n")

    return call


@pytest.fixture
def told(dmm):
    """What a verb prints as JSON, read strictly: NaN and infinities are no JSON."""

    def call(*words):
        return json.loads(dmm(*words, "--json"), parse_constant=pytest.fail)

    return call
