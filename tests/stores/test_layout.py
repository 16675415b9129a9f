import numpy as np
import pytest

from stores import score_block


@pytest.mark.parametrize("targets", [1, 7, 1797, 20_000, 60_000, 1_300_000])
@pytest.mark.parametrize("outputs", [1, 10, 1000])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pieces_are_of_a_good_size_and_blocks_equal(targets, outputs, dtype):
    block = score_block(targets, outputs, dtype)
    piece = block * outputs * np.dtype(dtype).itemsize
    assert piece <= 64 * 2**10
    # Evening the blocks out may take a part of the shortest piece, never half of it.
    assert piece >= 16 * 2**10 or block == targets
    last = targets - (-(-targets // block) - 1) * block
    assert last > block - -(-targets // block)


def test_memory_limits_a_block():
    assert score_block(60_000, 10, "float16", most=100) == 100


@pytest.mark.parametrize("wrong", [(0, 1, None), (1, 0, None), (1, 1, 0)])
def test_numbers_are_checked(wrong):
    targets, outputs, most = wrong
    with pytest.raises(ValueError, match="expected at least 1 target, output and target"):
        score_block(targets, outputs, "float32", most=most)
