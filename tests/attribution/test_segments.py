import numpy as np
import pytest
import torch

from attribution import ForgetSet, Recipe, draw_subsets, train_models
from attribution.segments import SegmentMeans, segment_of, segment_times
from attribution.training import train_many
from tests.references import plain_training, triangular_rate
from tests.tasks import CPU, blobs, normalised_mlp

# Even batches: 7 epochs of 5 steps on 33 to 37 rows, of 3 steps on 19.
RECIPE = Recipe(epochs=7, batch_size=8, peak_rate=0.2, momentum=0.9, weight_decay=5e-3)
SUBSETS = [np.arange(37), np.arange(4, 37), np.arange(0, 37, 2)]
INDICES, SEED = [0, 3, 8], 5
ROUNDING = 1e-5


def means_of(task, rows, index, segments):
    """Mean state dicts over each part of the steps, from the states written down at every step."""
    visited = []
    plain_training(task, rows, SEED, index, visited=visited)
    numbers = np.array([step * segments // len(visited) for step in range(len(visited))])
    parts = [[visited[step] for step in np.flatnonzero(numbers == s)] for s in range(segments)]
    return [
        {
            name: torch.stack([state[name] for state in part]).double().mean(0)
            if tensor.is_floating_point()
            else part[-1][name]
            for name, tensor in part[0].items()
        }
        for part in parts
    ]


def assert_means(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other)
        for name, tensor in one.items():
            wanted = other[name].to(tensor)
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("segments", [1, 2, 4])  # 35 and 21 steps are not divided by 2 or 4
@pytest.mark.parametrize("many", [False, True], ids=["one by one", "many at once"])
def test_means_are_those_of_the_states_that_steps_start_from(many, segments):
    task, means = blobs(recipe=RECIPE), SegmentMeans(segments)
    train_many(task, SUBSETS, SEED, INDICES, CPU, many=many, means=means)
    for place, (rows, index) in enumerate(zip(SUBSETS, INDICES, strict=True)):
        assert_means(means.states(place), means_of(task, rows, index, segments))


def test_statistics_of_batches_are_averaged_and_counts_are_the_last():
    task, means = blobs(model=normalised_mlp, recipe=RECIPE), SegmentMeans(2)
    train_many(task, SUBSETS[:1], SEED, INDICES[:1], CPU, many=False, means=means)
    assert_means(means.states(0), means_of(task, SUBSETS[0], INDICES[0], 2))
    counts = [value for state in means.states(0) for value in state.values() if not value.ndim]
    assert counts == [17, 34]  # a step starts from what the one before left


def test_taking_means_changes_no_model():
    task = blobs(recipe=RECIPE)
    plain = train_many(task, SUBSETS, SEED, INDICES, CPU)
    watched = train_many(task, SUBSETS, SEED, INDICES, CPU, means=SegmentMeans(3))
    for one, other in zip(plain, watched, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("segments", [1, 2, 5, 35])
def test_times_are_sums_of_rates_over_one_less_momentum(segments):
    expected = np.zeros(segments)
    for step in range(35):
        expected[segment_of(step, 35, segments)] += triangular_rate(RECIPE, step, 35) / (1 - 0.9)
    np.testing.assert_allclose(segment_times(RECIPE, 37, segments), expected, rtol=1e-12)


@pytest.mark.parametrize("segments", [0, -1, 36])
def test_segments_out_of_range_are_refused(segments):
    with pytest.raises(ValueError, match=f"of 35 steps has 1 to 35 segments, not {segments}"):
        segment_times(RECIPE, 37, segments)


@pytest.fixture(scope="module")
def task():
    return blobs(recipe=RECIPE)


def trained(task, to, models=3, **settings):
    subsets = draw_subsets(task, models=models, design="bernoulli", seed=SEED)
    given = {"keep": "weights", "segments": 2, "workers": 0} | settings
    return train_models(task, subsets, to, **given)


@pytest.fixture(scope="module")
def bank(task, tmp_path_factory):
    return trained(task, tmp_path_factory.mktemp("segments") / "bank", models_at_once=2)


class TestEnsemble:
    def test_it_keeps_the_means_of_each_training(self, task, bank):
        along = bank.along(3)
        assert len(along) == 6
        for index in range(3):
            rows = np.flatnonzero(bank.masks[index])
            found = [model.state for model in along[2 * index : 2 * index + 2]]
            assert_means(found, means_of(task, rows, index, 2))
            assert bank.times(index) == segment_times(RECIPE, len(rows), 2)

    def test_models_tell_where_they_come_from_and_what_they_never_saw(self, task, bank):
        found = bank.along(2)[3]
        told = {"ensemble": "bank", "index": 1, "seed": SEED, "segment": 1}
        assert found.provenance == told
        unseen = np.flatnonzero(~bank.masks[1])
        assert found.forgotten == ForgetSet.at(task, unseen)

    def test_outputs_and_weights_are_those_of_an_ensemble_without(self, task, bank, tmp_path):
        plain = trained(task, tmp_path / "plain", segments=0, models_at_once=2)
        np.testing.assert_array_equal(plain.outputs, bank.outputs)
        assert (plain.segments, bank.segments) == (0, 2)
        assert plain.times(0) == ()
        assert plain.along(3) == []

    def test_an_interrupted_call_ends_with_the_same_bits(self, task, bank, tmp_path):
        halved = trained(task, tmp_path / "halved", models_at_once=2)
        halved.store.discard(1)
        again = trained(task, tmp_path / "halved", models_at_once=2)
        for one, other in zip(again.along(3), bank.along(3), strict=True):
            assert one.digest() == other.digest()

    def test_another_number_of_segments_is_refused(self, task, bank):
        for segments in (0, 3):
            text = f"bank was trained with segments=2, this call asks for {segments}: give another"
            with pytest.raises(ValueError, match=text):
                trained(task, bank.store.path, segments=segments, models_at_once=2)

    def test_models_that_are_not_there_are_refused(self, bank):
        for ask in (lambda: bank.along(4), lambda: bank.times(3), lambda: bank.times(-1)):
            with pytest.raises(ValueError, match="bank has models 0 to 2, not"):
                ask()

    def test_outputs_alone_keep_no_means(self, task, tmp_path):
        with pytest.raises(ValueError, match="of 2 segments are kept with keep='weights' only"):
            trained(task, tmp_path / "x", keep="outputs")

    def test_a_task_that_trains_by_itself_has_no_segments(self, tmp_path):
        task = blobs(train=lambda rows, seed, device: {}, recipe=None)
        with pytest.raises(ValueError, match=r"task 'blobs' trains without one: give segments=0"):
            trained(task, tmp_path / "x")

    def test_more_segments_than_steps_are_refused(self, task, tmp_path):
        with pytest.raises(ValueError, match=r"steps has 1 to \d+ segments, not 99"):
            trained(task, tmp_path / "x", segments=99)
