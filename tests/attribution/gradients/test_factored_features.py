"""Features that are kept as factors too: of models made of Linear layers alone."""

import numpy as np
import pytest
import torch
from torch import nn

from attribution import ForgetSet, GroupNewton
from attribution.gradients import Features, Projection, feature_reading, feature_store, featurize
from attribution.gradients.jacobian import Dense, Factored
from tests.attribution.gradients.stored import ALL, SMALL, TRAIN, bits, checkpoint
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_store, "_worth_keeping", lambda *_: None)
        return featurize(task, checkpoints, to, projection=WIDE, block=10)


def kept(features):
    return ["factors" in store.spec.arrays for store in features.stores]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


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


@pytest.mark.parametrize("few", [False, True])
def test_blocks_are_those_of_the_training_rows(made, plain, monkeypatch, few):
    monkeypatch.setattr(feature_reading, "FACTOR_BYTES", 0 if few else 2**20)
    made, weights = Features.open(folder_of(made), made.task), torch.randn(TRAIN, 2)
    blocks, dense = list(made.blocks(0)), list(plain.blocks(0))
    assert len(blocks) == (4 if few else 1)
    assert all(isinstance(j, Factored) for _, j in blocks)
    assert all(isinstance(j, Dense) for _, j in dense)
    found, expected = (sum(j.pulled(weights[rows]) for rows, j in each) for each in (blocks, dense))
    close(found, expected.numpy())


def folder_of(features):
    return features.stores[0].path.removesuffix("/checkpoint-0")


def test_group_newton_predicts_the_same(task, made, plain):
    forget = ForgetSet.at(task, np.array([3, 8, 20]))
    with_factors, without = (
        GroupNewton(task, features, damping=0.5).change(forget) for features in (made, plain)
    )
    close(with_factors.mean, without.mean)


def test_an_interrupted_call_goes_on_with_the_same_bits(task, checkpoints, made, tmp_path):
    part = featurize(task, checkpoints, tmp_path / "f", projection=WIDE, block=10, targets="train")
    assert part.stores[0].pending() == [4]
    assert bits(featurize(task, checkpoints, tmp_path / "f", projection=WIDE, block=10)) == bits(
        made
    )


def test_features_of_a_version_without_factors_go_on_without(task, checkpoints, plain, tmp_path):
    given = {"projection": WIDE, "block": 10}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_store, "_worth_keeping", lambda *_: None)
        featurize(task, checkpoints, tmp_path / "f", targets="train", **given)
    resumed = featurize(task, checkpoints, tmp_path / "f", **given)
    assert kept(resumed) == [False, False]
    assert bits(resumed) == bits(plain)


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
    features = featurize(task, checkpoints[:1], tmp_path / "f", projection=WIDE, block=10)
    file = tmp_path / "f" / "checkpoint-0" / "factors" / "c" / "2" / "0"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"factors/c/2/0"):
        Features.open(tmp_path / "f", task).product(0, np.zeros(features.width, np.float32))
    assert features.stores[0].verify() == [2]


class Moody(nn.Module):
    """Calls its layer twice for rows whose first feature is large."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        found = self.mix(x)
        return self.head(self.mix(found) if float(x[:, 0].max()) > 2 else found)


def test_a_model_that_changes_its_mind_is_refused(tmp_path):
    task = blobs(model=Moody)
    with pytest.raises(Exception, match="calls its layers otherwise for some rows"):
        featurize(task, [checkpoint(task)], tmp_path / "f", projection=WIDE, block=10)
