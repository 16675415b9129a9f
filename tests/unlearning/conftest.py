"""Models of three blobs, trained once for all tests that need real ones."""

import pytest

from tests.unlearning.cases import branching, lay_ground, mlp, normalised, three_blobs


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    return lay_ground(three_blobs(mlp), tmp_path_factory.mktemp("blobs"))


@pytest.fixture(scope="session")
def normalised_ground(tmp_path_factory):
    return lay_ground(three_blobs(normalised), tmp_path_factory.mktemp("normalised"))


@pytest.fixture(scope="session")
def branching_ground(tmp_path_factory):
    return lay_ground(three_blobs(branching), tmp_path_factory.mktemp("branching"))
