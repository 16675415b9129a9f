from dataclasses import dataclass

import pytest
import torch

from attribution.gradients.jacobian import Dense, Factored, Factors
from attribution.newton import inverse
from attribution.newton.inverse import Damped, Removed, without

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


@dataclass(frozen=True)
class AsFactors(Factored):
    """Stands for factors, whatever its J is made of."""

    def dense(self):
        return self.rows

    def times(self, direction):
        return self.rows @ direction

    def pulled(self, weights):
        return Dense(self.rows).pulled(weights)


def as_factors(values):
    return AsFactors(Factors((), (), ()), values)


def removed_rows(rows, outputs=2, dtype=torch.float64, size=0.3, kind=as_factors):
    """Rows with curvature of rank one less than their outputs, as with softmax."""
    root = size * torch.randn(rows, outputs, outputs - 1, dtype=dtype)
    return Removed(kind(torch.randn(rows, outputs, WIDTH, dtype=dtype)), root @ root.mT)


def dense(removed):
    j, r = removed.j.dense().double(), removed.hessians.double()
    return torch.einsum("rai,rab,rbj->ij", j, r, j)


def test_the_curvature_of_removed_rows(curvature):
    removed, vector = removed_rows(5), torch.randn(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(removed.times(vector), dense(removed) @ vector)
    torch.testing.assert_close(removed.root().T @ removed.root(), dense(removed))
    assert removed.directions == len(removed.root()) == 10


def solved(matrix, vector):
    return torch.linalg.solve(matrix, vector.double())


WAYS = {"gradients": (as_factors, 0), "Woodbury": (as_factors, 1000), "a factor": (Dense, 0)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [0, 1, 5, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_ways_equal_the_dense_inverse(curvature, monkeypatch, way, rows, dtype):
    kind, few = WAYS[way]
    monkeypatch.setattr(inverse, "FEW", few)
    removed = removed_rows(rows, dtype=dtype, kind=kind)
    vector = torch.randn(WIDTH, dtype=dtype)
    found = without(Damped(curvature + dense(removed), 0.5), removed)
    expected = solved(curvature + 0.5 * torch.eye(WIDTH), vector)
    assert found.exact(vector).dtype == found.rough(vector).dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(
        found.exact(vector).double(), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(("kind", "few"), WAYS.values(), ids=WAYS)
def test_roughly_by_gradients_is_without_the_removal(curvature, monkeypatch, kind, few):
    monkeypatch.setattr(inverse, "FEW", few)
    removed, vector = removed_rows(9, kind=kind), torch.randn(WIDTH, dtype=torch.float64)
    whole = curvature + dense(removed)
    found = without(Damped(whole, 0.5), removed).rough(vector)
    left = whole if (kind, few) == WAYS["gradients"] else curvature
    torch.testing.assert_close(found, solved(left + 0.5 * torch.eye(WIDTH), vector))


# Up to 6 directions by Woodbury's identity, from the factor of all rows.
@pytest.mark.parametrize(("rows", "known"), [(3, True), (4, False)])
def test_without_factors_the_way_of_fewer_multiplications_is_taken(curvature, rows, known):
    removed = removed_rows(rows, kind=Dense)
    damped = Damped(curvature + dense(removed), 1.0)
    without(damped, removed)
    assert ("lower" in vars(damped)) == known


@pytest.mark.parametrize("most", [0, 2])
def test_where_gradients_do_not_settle_a_new_factor_is_made(curvature, monkeypatch, most):
    monkeypatch.setattr(inverse, "FEW", 0)
    monkeypatch.setattr(inverse, "MOST_ITERATIONS", most)
    removed, vector = removed_rows(9, size=1), torch.randn(WIDTH, dtype=torch.float64)
    found = without(Damped(curvature + dense(removed), 0.5), removed).exact
    for _ in range(2):
        torch.testing.assert_close(
            found(vector), solved(curvature + 0.5 * torch.eye(WIDTH), vector)
        )
    assert "_factor" in vars(found)


@pytest.mark.parametrize("few", [0, 1000])
def test_the_input_stays_as_it_is(curvature, monkeypatch, few):
    monkeypatch.setattr(inverse, "FEW", few)
    before, vector = curvature.clone(), torch.randn(WIDTH, dtype=torch.float64)
    without(Damped(curvature, 1.0), removed_rows(2, size=0.01)).exact(vector)
    assert torch.equal(curvature, before)


def test_a_matrix_that_is_not_positive_definite_is_refused(curvature):
    text = "not positive definite at damping 0.001: raise the damping"
    with pytest.raises(ValueError, match=text):
        _ = Damped(-curvature, 1e-3).lower


@pytest.mark.parametrize(("kind", "few"), WAYS.values(), ids=WAYS)
def test_more_removed_than_there_is_is_refused(curvature, monkeypatch, kind, few):
    monkeypatch.setattr(inverse, "FEW", few)
    removed = removed_rows(4, size=100, kind=kind)
    with pytest.raises(ValueError, match="the curvature is not positive definite at damping"):
        without(Damped(curvature, 0.5), removed).exact(torch.randn(WIDTH, dtype=torch.float64))
