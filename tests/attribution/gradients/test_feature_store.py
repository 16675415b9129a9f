import numpy as np
import pytest

from attribution.gradients.feature_reading import in_full
from attribution.gradients.feature_store import Layout, half_scale

SHAPES = {"many outputs": (1000, 10, 1344), "one output": (5000, 1, 100), "huge": (20, 100, 10**6)}


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_block_is_one_object_of_about_16_mebibytes(sizes, dtype):
    spec = Layout(*sizes, dtype, "float32").spec(None)
    nbytes = np.prod(spec.chunks("features")) * np.dtype(dtype).itemsize
    assert spec.chunks("features")[1:] == sizes[1:]
    assert nbytes <= 2**24 or spec.block == 1
    assert nbytes > 2**23 or spec.block == min(spec.block, sizes[0])
    assert ("scale" in spec.arrays) == (dtype == "float16")


def test_blocks_of_a_given_size():
    assert Layout(50, 2, 3, "float32", "float32").spec(7).block == 7
    assert Layout(50, 2, 3, "float32", "float32").spec(70).block == 50


def test_scales_are_powers_of_two_that_use_the_range():
    vectors = np.random.default_rng(0).normal(size=(50, 9)) * 10.0 ** np.arange(-25, 25)[:, None]
    vectors = vectors.astype(np.float32)
    scale = half_scale(vectors)
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(np.exp2(np.round(np.log2(scale))), scale)
    largest = np.abs(vectors / scale[:, None]).max(1)
    assert (largest >= 2**14).all()
    assert (largest < 2**15).all()


def test_numbers_of_eleven_bits_come_back():
    random = np.random.default_rng(0)
    exact = random.integers(-2047, 2048, (20, 2, 9)) * 2.0 ** random.integers(-12, 3, (20, 2, 9))
    exact[3] = 0
    scale = half_scale(exact)
    stored = (exact / scale[..., None]).astype(np.float16)
    np.testing.assert_array_equal(in_full(stored, scale), exact)
    assert in_full(stored, scale).dtype == np.float32
    assert in_full(exact, None) is exact
