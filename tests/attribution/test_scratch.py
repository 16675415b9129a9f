import os
import tempfile

import pytest
import torch

from attribution.scratch import Columns


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("most", [0, 10**6])
@pytest.mark.parametrize("rows", [slice(None), slice(2, 5), slice(6, 7)])
def test_what_was_added_is_read_again_and_again(folder, most, rows):
    values = numbers(7, 11, 2)
    with Columns(values.shape, 1, values.dtype, most) as columns:
        for part in values.split([4, 1, 6], 1):
            columns.add(part)
        assert columns.on_disk == (most == 0)
        for _ in range(2):
            parts = [part.clone() for part in columns.read(rows)]
            assert len(parts) == (1 if most else 3)
            assert torch.equal(torch.cat(parts, 1), values[rows])


@pytest.mark.parametrize("most", [0, 10**6])
def test_what_is_made_of_the_parts_stands_side_by_side(folder, most):
    values, left = numbers(7, 11, 2), numbers(5, 3)
    with Columns(values.shape, 1, values.dtype, most) as columns:
        for part in values.split([4, 1, 6], 1):
            columns.add(part)
        found = columns.through(lambda part: torch.tensordot(left, part, 1), slice(2, 5))
    torch.testing.assert_close(found, torch.tensordot(left, values[2:5], 1))


def test_targets_may_come_first(folder):
    values = numbers(11, 2, 3)
    with Columns(values.shape, 0, values.dtype, most=0) as columns:
        for part in values.split(4):
            columns.add(part)
        assert torch.equal(torch.cat([part.clone() for part in columns.read()]), values)


def test_memory_is_what_one_part_takes(folder):
    values = numbers(50, 40, 1)
    with Columns(values.shape, 1, values.dtype, most=values.nbytes - 1) as columns:
        for part in values.split(8, 1):
            columns.add(part)
        places = {part.data_ptr() for part in columns.read()}
        assert len(places) == 1


def interrupted(folder):
    with Columns((2, 2), 1, torch.float32, most=0) as columns:
        columns.add(torch.ones(2, 1))
        assert os.listdir(folder) == []  # the file has no name
        raise KeyboardInterrupt


def test_nothing_is_left_after_an_error(folder):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        interrupted(folder)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_was_cut_short_is_refused(folder):
    with Columns((2, 2), 1, torch.float32, most=0) as columns:
        columns.add(torch.ones(2, 2))
        columns._file.truncate(12)
        with pytest.raises(OSError, match="the temporary file lacks 4 bytes of 16"):
            list(columns.read())


def test_a_full_disk_is_told_with_its_cure(folder):
    with Columns((2, 3), 1, torch.float32, most=0) as columns:
        columns.file.close()
        columns.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        with pytest.raises(OSError, match=f"needs 24 bytes .* in {folder}; name another .* TMPDIR"):
            columns.add(torch.ones(2, 2))
