"""Features that are kept as factors too: of models made of Linear layers alone."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from attribution import ForgetSet, GroupNewton, StagedNewton
from attribution.gradients import (
    Features,
    Projection,
    compute_curvatures,
    feature_reading,
    features,
    featurize,
)
from attribution.gradients.jacobian import Dense, Factored
from tests.attribution.gradients.stored import ALL, SMALL, TRAIN, bits, checkpoint, close, folder_of
from tests.tasks import blobs

WIDE = Projection(inputs=64, outputs=64, features=20, seed=2)  # sums the products of one layer


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def checkpoints(task):
    return [checkpoint(task, 0), checkpoint(task, 1)]


@pytest.fixture(scope="module")
def made(task, checkpoints, tmp_path_factory):
    to = tmp_path_factory.mktemp("factored") / "features"
    return featurize(task, checkpoints, to, projection=WIDE, block=10)


@pytest.fixture(scope="module")
def plain(task, checkpoints, tmp_path_factory):
    """The same without factors, as an earlier version made them."""
    to = tmp_path_factory.mktemp("plain") / "features"
    return featurize(task, checkpoints, to, projection=WIDE, block=10, factors=False)


def kept(features):
    return ["factors" in store.spec.arrays for store in features.stores]


def test_factors_are_kept_beside_the_same_features(made, plain):
    assert (kept(made), kept(plain)) == ([True] * 2, [False] * 2)
    for number in (0, 1):
        close(made.gather(number, np.arange(ALL)), plain.gather(number, np.arange(ALL)))


@pytest.mark.parametrize("rows", [None, [40, 3, 3, 0], list(range(1, ALL))], ids=str)
def test_products_are_those_of_the_features(made, rows):
    direction = np.random.default_rng(0).normal(size=made.width)
    wanted = np.arange(ALL) if rows is None else np.array(rows)
    found = made.product(1, direction, None if rows is None else wanted)
    assert found.dtype == np.float32
    close(found, made.gather(1, wanted) @ direction)


@pytest.mark.parametrize("kept", [0, 2**20])
@pytest.mark.parametrize("together", [1, 2, 3, 9])
def test_blocks_are_those_of_the_training_rows(made, plain, monkeypatch, together, kept):
    row = made.stores[0].spec.array("factors").shape[1] * 4
    monkeypatch.setattr(feature_reading, "PIECE_BYTES", together * 10 * row)
    monkeypatch.setattr(features, "KEPT_BYTES", kept)
    made, weights = Features.open(folder_of(made), made.task), torch.randn(TRAIN, 2)
    blocks, dense = list(made.blocks(0)), list(plain.blocks(0))
    assert [rows.start for rows, _ in blocks] == list(range(0, TRAIN, 10 * together))
    assert (blocks[0][1] is next(iter(made.blocks(0)))[1]) == bool(kept)
    assert all(isinstance(j, Factored) for _, j in blocks)
    assert all(isinstance(j, Dense) for _, j in dense)
    found, expected = (sum(j.pulled(weights[rows]) for rows, j in each) for each in (blocks, dense))
    close(found, expected.numpy())


def test_group_newton_predicts_the_same(task, made, plain):
    forget = ForgetSet.at(task, np.array([3, 8, 20]))
    with_factors, without = (
        GroupNewton(task, features, damping=0.5).change(forget) for features in (made, plain)
    )
    close(with_factors.mean, without.mean)


def test_what_was_read_does_not_travel(made):
    fresh = pickle.dumps(Features.open(folder_of(made), made.task))
    read = Features.open(folder_of(made), made.task)
    read.curvature(0)
    list(read.blocks(0))
    assert pickle.dumps(read) == fresh
    newton = GroupNewton(made.task, read, damping=0.5)
    plain = pickle.dumps(newton)
    newton.change(ForgetSet.at(made.task, np.array([3, 8])))
    assert pickle.dumps(newton) == plain


@pytest.mark.parametrize(("asked", "numbers"), [(None, {0, 1}), ([1], {1})])
@pytest.mark.parametrize("workers", [0, 2])
def test_curvatures_are_computed_beforehand(made, tmp_path, asked, numbers, workers):
    shutil.copytree(folder_of(made), tmp_path / "f", ignore=shutil.ignore_patterns("curvature*"))
    copy = Features.open(tmp_path / "f", made.task)
    compute_curvatures(copy, [1.0], asked, workers=workers)
    found = {int(path.name.split("-")[1]) for path in (tmp_path / "f").glob("curvature-*")}
    assert found == numbers
    for number in found:
        np.testing.assert_array_equal(copy.curvature(number), made.curvature(number))


def test_an_interrupted_call_goes_on_with_the_same_bits(task, checkpoints, made, tmp_path):
    part = featurize(task, checkpoints, tmp_path / "f", projection=WIDE, block=10, targets="train")
    assert part.stores[0].pending() == [4]
    assert bits(featurize(task, checkpoints, tmp_path / "f", projection=WIDE, block=10)) == bits(
        made
    )


def test_features_of_a_version_without_factors_go_on_without(task, checkpoints, plain, tmp_path):
    given = {"projection": WIDE, "block": 10}
    featurize(task, checkpoints, tmp_path / "f", targets="train", factors=False, **given)
    resumed = featurize(task, checkpoints, tmp_path / "f", **given)
    assert kept(resumed) == [False, False]
    assert bits(resumed) == bits(plain)


def test_checkpoints_that_a_version_with_factors_adds_have_them(task, checkpoints, made, tmp_path):
    given = {"projection": WIDE, "block": 10}
    featurize(task, checkpoints[:1], tmp_path / "f", factors=False, **given)
    both = featurize(task, checkpoints, tmp_path / "f", **given)
    assert kept(both) == [False, True]
    forget = ForgetSet.at(task, np.array([3, 8, 20]))
    found, expected = (
        GroupNewton(task, each, damping=0.5).change(forget).mean for each in (both, made)
    )
    close(found, expected)


@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"projection": SMALL}], ids=str)
def test_factors_that_save_nothing_or_are_finer_than_the_features_are_not_kept(
    task, checkpoints, tmp_path, changes
):
    given = {"projection": WIDE} | changes
    assert kept(featurize(task, checkpoints[:1], tmp_path / "f", **given)) == [False]


def test_doubles_have_double_factors(checkpoints, made, tmp_path):
    found = featurize(made.task, checkpoints, tmp_path / "f", projection=WIDE, dtype="float64")
    assert found.stores[0].spec.array("factors").dtype == "float64"
    direction = np.random.default_rng(0).normal(size=made.width)
    close(found.product(0, direction), made.product(0, direction))


def test_damaged_factors_are_told(task, checkpoints, tmp_path):
    damaged = featurize(task, checkpoints[:1], tmp_path / "f", projection=WIDE, block=10)
    file = tmp_path / "f" / "checkpoint-0" / "factors" / "c" / "2" / "0"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"factors/c/2/0"):
        Features.open(tmp_path / "f", task).product(0, np.zeros(damaged.width, np.float32))
    assert damaged.stores[0].verify() == [2]


class Moody(nn.Module):
    """Calls its layer twice for rows whose first feature is large."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        found = self.mix(x)
        return self.head(self.mix(found) if float(x[:, 0].max()) > 2 else found)


def test_a_model_that_changes_its_mind_has_none(tmp_path):
    task = blobs(model=Moody)
    given = {"projection": WIDE, "block": 10}
    told = r"calls its layers otherwise for some rows .* factors=False, or dmm precompute --no-f"
    with pytest.raises(ValueError, match=told):
        featurize(task, [checkpoint(task)], tmp_path / "f", **given)
    made = featurize(task, [checkpoint(task)], tmp_path / "g", factors=False, **given)
    assert kept(made) == [False]
    assert made.stores[0].verify() == []
    newton = GroupNewton(task, made, damping=0.5)
    change = StagedNewton(newton, 2).change(ForgetSet.at(task, np.array([3, 8])))
    assert np.isfinite(change.mean).all()


def test_what_is_there_keeps_its_factors(task, checkpoints, made, tmp_path):
    given = {"projection": WIDE, "block": 10}
    featurize(task, checkpoints, tmp_path / "f", targets="train", **given)
    resumed = featurize(task, checkpoints, tmp_path / "f", factors=False, **given)
    assert bits(resumed) == bits(made)
