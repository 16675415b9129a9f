import numpy as np
import pytest
import torch

from attribution.gradients import Projection
from attribution.gradients.projection import GRID, orthogonal_matrices, sparse_projection

PHILOX = [-0.7947998046875, 0.56549072265625, -1.14483642578125]
SIZES = {"dealt unevenly": (4, 11), "dealt evenly": (4, 12), "one row": (1, 5), "kept": (5, 5)}


def drawn(seed=0, checkpoint=0, name="layer.inputs"):
    return orthogonal_matrices(Projection(seed=seed).random(checkpoint, name), 2, 3, 7)


def sparse(size, width, seed=0):
    return sparse_projection(Projection(seed=seed).random(0, "vectors"), size, width)


def test_matrices_depend_on_seed_checkpoint_and_name_alone():
    assert torch.equal(drawn(), drawn())
    for other in (drawn(seed=1), drawn(checkpoint=1), drawn(name="layer.outputs")):
        assert not torch.equal(drawn(), other)


def test_names_in_which_only_the_order_differs_draw_other_matrices():
    assert not torch.equal(drawn(name="ab"), drawn(name="ba"))


def test_the_numbers_are_those_of_philox():
    # Stored features can only be used with the matrices that made them.
    assert drawn()[0, 0, :3].tolist() == PHILOX


def test_rows_are_orthogonal_and_scaled():
    matrices = orthogonal_matrices(Projection().random(0, "a"), 2, 16, 40).double()
    assert matrices.shape == (2, 16, 40)
    expected = 40 / 16 * torch.eye(16, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(matrices @ matrices.mT, expected, rtol=0, atol=1e-3)
    assert not torch.allclose(matrices[0], matrices[1], atol=0.1)


def test_entries_are_rounded_to_what_every_machine_gives():
    scaled = GRID * orthogonal_matrices(Projection().random(0, "a"), 1, 5, 30)
    assert torch.equal(scaled, scaled.round())


def test_directions_are_uniform():
    drawn = [orthogonal_matrices(Projection(seed=s).random(0, "a"), 1, 3, 7) for s in range(2000)]
    mean = torch.cat(drawn).mT @ torch.cat(drawn)
    torch.testing.assert_close(mean.mean(0), torch.eye(7), rtol=0, atol=0.07)
    assert torch.cat(drawn).mean(0).abs().max() < 0.05  # neither sign is preferred


def test_a_side_that_is_not_larger_is_kept():
    random = Projection().random(0, "a")
    assert orthogonal_matrices(random, 1, 7, 7) is None
    assert orthogonal_matrices(random, 1, 7, 8).shape == (1, 7, 8)


@pytest.mark.parametrize(("size", "width"), SIZES.values(), ids=SIZES.keys())
def test_adjoint_of_a_sparse_projection_is_its_transpose(size, width):
    projection = sparse(size, width)
    forward = projection.apply(torch.eye(width, dtype=torch.float64)).T
    backward = projection.adjoint(torch.eye(size, dtype=torch.float64))
    assert forward.shape == (size, width)
    torch.testing.assert_close(backward, forward, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "width"), SIZES.values(), ids=SIZES.keys())
def test_a_sparse_projection_deals_every_column_to_one_row(size, width):
    matrix = sparse(size, width).apply(torch.eye(width)).T
    assert torch.equal(matrix.abs().sum(0), torch.ones(width))
    loads = matrix.abs().sum(1)
    assert loads.max() - loads.min() <= 1


def test_leading_axes_are_kept():
    vectors = torch.randn(2, 3, 11)
    projection = sparse(4, 11)
    found = projection.apply(vectors)
    assert found.shape == (2, 3, 4)
    torch.testing.assert_close(found[1, 2], projection.apply(vectors[1, 2]), rtol=0, atol=0)


def test_a_sparse_projection_keeps_inner_products_in_the_mean():
    mean = torch.zeros(6, 6)
    for seed in range(3000):
        matrix = sparse(3, 6, seed).apply(torch.eye(6))
        mean += matrix @ matrix.T / 3000
    torch.testing.assert_close(mean, torch.eye(6), rtol=0, atol=0.05)


def test_settings_come_back():
    projection = Projection(inputs=3, outputs=4, features=5, seed=6)
    assert Projection.of(projection.settings()) == projection
    before = {"inputs": 3, "outputs": 4, "vectors": 5, "seed": 6}
    with pytest.raises(
        ValueError, match=r"features, seed, principal of a projection, got .*, vectors, seed:"
    ):
        Projection.of(before)


@pytest.mark.parametrize("field", ["inputs", "outputs", "features"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(ValueError, match=rf"projection\.{field} must be 1 or more, got 0"):
        Projection(**{field: 0})


def test_other_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"projection\.seed must be 0 or more, got -1"):
        Projection(seed=-1)
    with pytest.raises(TypeError, match=r"projection\.inputs must be an integer, got 2\.5"):
        Projection(inputs=2.5)
    with pytest.raises(TypeError, match=r"projection\.seed must be an integer, got True"):
        Projection(seed=True)


def test_generators_are_counter_based():
    assert isinstance(Projection().random(0, "a").bit_generator, np.random.Philox)
