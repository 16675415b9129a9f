"""One thread, one seed and no deadlines: the same numbers on a busy machine as on an idle one."""

import os

import hypothesis
import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)

hypothesis.settings.register_profile("shared_machine", deadline=None, derandomize=True)
hypothesis.settings.load_profile("shared_machine")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
