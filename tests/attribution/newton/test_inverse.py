import pytest
import torch

from attribution.newton.inverse import Damped, without

WIDTH = 12


@pytest.fixture
def curvature():
    root = torch.randn(20, WIDTH, dtype=torch.float64)
    return root.T @ root


@pytest.mark.parametrize("damping", [1e-3, 1.0, 100.0])
def test_the_factor_is_that_of_the_damped_matrix(curvature, damping):
    found = Damped(curvature, damping)
    damped = curvature + damping * torch.eye(WIDTH)
    torch.testing.assert_close(found.lower @ found.lower.T, damped)
    assert torch.equal(found.lower, found.lower.tril())
    assert found.damping == damping


# Up to 6 directions by Woodbury's identity, above by a new factor.
@pytest.mark.parametrize("directions", [0, 1, 6, 7, 12, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_equal_the_dense_inverse(curvature, directions, dtype):
    removed = torch.randn(directions, WIDTH, dtype=dtype) / 3
    whole = curvature + removed.double().T @ removed.double()
    vector = torch.randn(WIDTH, dtype=dtype)
    found = without(whole, removed)(Damped(whole, 0.5))(vector)
    expected = torch.linalg.solve(
        curvature + 0.5 * torch.eye(WIDTH, dtype=torch.float64), vector.double()
    )
    assert found.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("directions", "known"), [(1, True), (9, False)])
def test_the_factor_of_all_rows_is_made_only_for_few_directions(curvature, directions, known):
    damped = Damped(curvature, 100.0)
    without(curvature, torch.full((directions, WIDTH), 0.01))(damped)
    assert ("lower" in vars(damped)) == known


def test_the_input_stays_as_it_is(curvature):
    before = curvature.clone()
    without(curvature, torch.zeros(9, WIDTH))(Damped(curvature, 1.0))
    assert torch.equal(curvature, before)


def test_a_matrix_that_is_not_positive_definite_is_refused(curvature):
    text = "not positive definite at damping 0.001: raise the damping"
    with pytest.raises(ValueError, match=text):
        _ = Damped(-curvature, 1e-3).lower


@pytest.mark.parametrize("directions", [1, 9])
def test_more_removed_than_there_is_is_refused(curvature, directions):
    removed = torch.zeros(directions, WIDTH)
    removed[0, 3] = 100
    with pytest.raises(ValueError, match="the curvature is not positive definite at damping"):
        without(curvature, removed)(Damped(curvature, 0.5))
