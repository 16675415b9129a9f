import numpy as np
import pytest

from stores import score_block


@pytest.mark.parametrize("targets", [1, 7, 1797, 20_000, 33_000, 60_000, 1_300_000])
@pytest.mark.parametrize("outputs", [1, 10, 1000])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pieces_are_of_a_good_size_and_blocks_equal(targets, outputs, dtype):
    block = score_block(targets, outputs, dtype)
    piece = block * outputs * np.dtype(dtype).itemsize
    assert piece <= 64 * 2**10
    assert piece >= 32 * 2**10 or block == targets
    blocks = -(-targets // block)
    last = targets - (blocks - 1) * block
    assert last > block - blocks


@pytest.mark.parametrize(("targets", "outputs"), [(32_768, 1), (20_000, 1), (1_638, 20)])
def test_a_row_that_fits_is_one_piece(targets, outputs):
    assert score_block(targets, outputs, "float16") == targets
    assert score_block(2 * targets, outputs, "float16") < 2 * targets


def test_targets_of_many_outputs_stand_alone():
    assert score_block(5, 40_000, "float16") == 1


@pytest.mark.parametrize("wrong", [(0, 1), (1, 0)])
def test_numbers_are_checked(wrong):
    with pytest.raises(ValueError, match="expected at least 1 target and 1 output, got"):
        score_block(*wrong, "float32")
