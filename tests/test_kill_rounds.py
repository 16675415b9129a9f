"""A few of the rounds of kill -9 that examples/benchmarks/kill_rounds.py runs by the dozen."""

from pathlib import Path

import pytest

from examples.benchmarks import kill_rounds


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")
def test_killed_processes_leave_whole_blocks_and_the_same_bits(tmp_path):
    # Any wrong bit is raised.
    _, found = kill_rounds.rounds(3, 4, 0, tmp_path)
    assert [round.kind for round in found] == ["driver", "workers", "both"]
    # Whoever was killed inside a write was killed.
    assert all(round.hit for round in found if round.inside)
