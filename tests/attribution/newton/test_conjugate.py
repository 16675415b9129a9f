import pytest
import torch

from attribution.newton.conjugate import conjugate

WIDTH = 7


@pytest.fixture
def matrix():
    root = torch.randn(40, WIDTH, dtype=torch.float64)
    return root.T @ root


@pytest.fixture
def right():
    return torch.randn(WIDTH, dtype=torch.float64)


def test_an_exact_inverse_takes_one_step(matrix, right):
    asked = []

    def apply(vector):
        asked.append(1)
        return matrix @ vector

    inverse = matrix.inverse()
    found, settled = conjugate(apply, right, lambda v: inverse @ v, enough=1e-6, most=10)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right))
    assert (settled, len(asked)) == (True, 1)


@pytest.mark.parametrize("enough", [0.1, 1e-4, 1e-12])
def test_the_residual_is_within_the_tolerance(matrix, right, enough):
    by_diagonal = {"enough": enough, "most": 50}
    found, settled = conjugate(
        lambda v: matrix @ v, right, lambda v: v / matrix.diagonal(), **by_diagonal
    )
    assert settled
    assert float((right - matrix @ found).norm()) <= 1.001 * enough * float(right.norm())


def test_it_stops_after_the_iterations_allowed_and_tells():
    asked, scales = [], torch.logspace(0, 8, 60, dtype=torch.float64)

    def apply(vector):
        asked.append(1)
        return scales * vector

    ones = torch.ones(60, dtype=torch.float64)
    _, settled = conjugate(apply, ones, lambda v: v, enough=1e-6, most=10)
    assert (settled, len(asked)) == (False, 10)


def test_a_matrix_that_is_not_positive_definite_does_not_settle(right):
    scales = torch.ones(WIDTH, dtype=torch.float64)
    scales[2] = -100
    found, settled = conjugate(lambda v: scales * v, right, lambda v: v, enough=1e-6, most=50)
    assert not settled
    assert torch.isfinite(found).all()


def test_zero_stays_zero(matrix):
    nothing = torch.zeros(WIDTH, dtype=torch.float64)
    found, settled = conjugate(lambda v: matrix @ v, nothing, lambda v: v, enough=1e-6, most=9)
    assert settled
    assert torch.equal(found, nothing)
