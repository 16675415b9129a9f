import math
import sys

import numpy as np
import pytest
from scipy import stats

from attribution import draw_subsets
from attribution.lds import (
    lds,
    lds_bank,
    linear_datamodeling_score,
    ranks,
    split_half,
    split_half_ceiling,
)
from tests.tasks import blobs, line, write_ensemble

TRAIN_ROWS, TARGETS = 37, 48


def reference_lds(predictions, truths):
    """Spearman correlation of every column, by scipy."""
    flat = [np.reshape(values, (len(values), -1)) for values in (predictions, truths)]
    columns = [stats.spearmanr(a, b).statistic for a, b in zip(*(f.T for f in flat), strict=True)]
    return np.reshape(columns, np.shape(truths)[1:])


def true_scores(seed=0):
    return np.random.default_rng(seed).normal(size=(TRAIN_ROWS, TARGETS))


def synthetic_bank(path, *, subsets=60, repeats=2, noise=1.0, seed=1, shuffled=False):
    """Outputs that are the sum of true scores and chance; trainings on one subset in a row."""
    random = np.random.default_rng(seed)
    masks = random.permuted(np.tile(np.arange(TRAIN_ROWS) % 2 == 0, (subsets, 1)), axis=1)
    masks = np.repeat(masks, repeats, axis=0)
    outputs = masks @ true_scores() + noise * random.normal(size=(len(masks), TARGETS))
    order = random.permutation(len(masks)) if shuffled else np.arange(len(masks))
    return write_ensemble(path, line(), masks[order], outputs[order][..., None])


@pytest.mark.parametrize("shape", [(7,), (13, 3), (2, 4), (1, 3), (9, 3, 2)])
@pytest.mark.parametrize("values", [2, 5, 1000])
def test_ranks_are_those_of_scipy(shape, values):
    drawn = np.random.default_rng(values).integers(values, size=shape).astype(np.float32)
    np.testing.assert_array_equal(ranks(drawn), stats.rankdata(drawn, axis=0))


@pytest.mark.parametrize("shape", [(13, 3), (40, 5, 2)])
@pytest.mark.parametrize("values", [3, 1000])
def test_lds_is_the_spearman_correlation_ties_included(shape, values):
    random = np.random.default_rng(values)
    predictions, truths = random.integers(values, size=(2, *shape)).astype(np.float64)
    expected = reference_lds(predictions, truths)
    np.testing.assert_allclose(lds(predictions, truths), expected, atol=1e-12)


def test_only_the_order_counts():
    random = np.random.default_rng(0)
    predictions, truths = random.normal(size=(2, 30, 4))
    found = lds(predictions, truths)
    np.testing.assert_array_equal(lds(3 * predictions - 7, np.exp(truths)), found)
    np.testing.assert_allclose(lds(-predictions, truths), -found)
    np.testing.assert_allclose(lds(truths, np.exp(truths)), 1)


def test_what_is_constant_has_no_order():
    values = np.random.default_rng(1).normal(size=(10, 3))
    values[:, 1] = 0.1
    other = np.random.default_rng(2).normal(size=(10, 3))
    for found in (lds(values, other), lds(other, values)):
        np.testing.assert_array_equal(np.isnan(found), [False, True, False])


@pytest.mark.parametrize("repeats", [1, 2, 5])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_ceiling_is_what_the_best_predictor_reaches(share, repeats):
    """One training is s + e; s is all that can be predicted, and `share` its part of the variance.

    20,000 subsets leave a correlation a standard error of .007.
    """
    random = np.random.default_rng(repeats)
    best = random.normal(0, math.sqrt(share), size=(20_000, 1))
    trainings = best + random.normal(0, math.sqrt(1 - share), size=(repeats + 1, *best.shape))
    ceiling = split_half_ceiling(split_half(trainings), repeats)
    reached = lds(best, trainings[:repeats].mean(0))
    np.testing.assert_allclose(ceiling, reached, atol=0.025)
    # The correlation itself is Spearman's of two normal variables that correlate by the share.
    expected = 6 / math.pi * math.asin(share / 2)
    np.testing.assert_allclose(split_half(trainings), expected, atol=0.025)


def test_ends_of_the_ceiling():
    ends = np.array([1, 0, -0.4, np.nan])
    for repeats in (1, 3):
        np.testing.assert_allclose(split_half_ceiling(ends, repeats), [1, 0, 0, np.nan], atol=1e-12)


def test_split_half_is_the_mean_over_pairs_of_trainings():
    trainings = np.random.default_rng(3).normal(size=(3, 20, 4))
    pairs = [reference_lds(trainings[a], trainings[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(split_half(trainings), np.mean(pairs, axis=0), atol=1e-12)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_scores_of_an_ensemble_equal_the_reference(tmp_path, repeats, shuffled):
    bank = synthetic_bank(tmp_path / "bank", repeats=repeats, shuffled=shuffled)
    scores = true_scores() + np.random.default_rng(4).normal(size=(TRAIN_ROWS, TARGETS))
    by_subset = {}
    for mask, margins in zip(bank.masks, bank.margins, strict=True):
        by_subset.setdefault(tuple(mask), []).append(margins)
    predictions = np.array([scores[list(mask)].sum(0) for mask in by_subset])
    truths = np.array([np.mean(trainings, axis=0) for trainings in by_subset.values()])
    found = linear_datamodeling_score(scores, bank)
    np.testing.assert_allclose(found.values, reference_lds(predictions, truths), atol=1e-12)
    assert found.mean == pytest.approx(found.values.mean())
    assert found.interval[0] < found.mean < found.interval[1]
    trainings = np.moveaxis(np.array(list(by_subset.values())), 1, 0)
    halves = split_half(trainings)
    if not shuffled:
        np.testing.assert_allclose(found.split_half, halves, atol=1e-12)
        np.testing.assert_allclose(found.ceiling, split_half_ceiling(halves, repeats))


def test_the_true_scores_reach_the_ceiling(tmp_path):
    bank = synthetic_bank(tmp_path / "bank", subsets=400, noise=3.0)
    found = linear_datamodeling_score(true_scores(), bank)
    assert 0.5 < found.mean < 0.9
    assert found.mean == pytest.approx(found.ceiling.mean(), abs=0.02)
    assert linear_datamodeling_score(-true_scores(), bank).mean == pytest.approx(-found.mean)
    assert abs(linear_datamodeling_score(true_scores(9), bank).mean) < 0.05


def test_a_subset_trained_on_once_has_no_ceiling(tmp_path):
    found = linear_datamodeling_score(true_scores(), synthetic_bank(tmp_path / "b", repeats=1))
    assert np.isnan(found.split_half).all()
    assert np.isnan(found.ceiling).all()
    assert found.values.shape == found.ceiling.shape == (TARGETS,)
    assert np.isfinite(found.mean)


def test_some_targets_only(tmp_path):
    bank, chosen = synthetic_bank(tmp_path / "bank"), np.array([40, 3, 47])
    whole = linear_datamodeling_score(true_scores(), bank)
    found = linear_datamodeling_score(true_scores()[:, chosen], bank, targets=chosen)
    for name in ("values", "split_half", "ceiling"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name)[chosen], atol=1e-12)


def test_scores_of_every_output(tmp_path):
    task, random = blobs(), np.random.default_rng(5)
    bank = synthetic_bank(tmp_path / "line")
    outputs = random.normal(size=(len(bank), TARGETS, 2)).astype(np.float32)
    bank = write_ensemble(tmp_path / "bank", task, bank.masks, outputs)
    scores = random.normal(size=(TRAIN_ROWS, TARGETS, 2))
    found = linear_datamodeling_score(scores, bank)
    predictions = np.einsum("st,tjo->sjo", bank.masks[::2].astype(float), scores)
    truths = (outputs[::2] + outputs[1::2]) / 2
    np.testing.assert_allclose(found.values, reference_lds(predictions, truths), atol=1e-12)
    assert found.ceiling.shape == (TARGETS, 2)
    # Margins of two classes are differences of logits: their scores are too.
    _, labels = task.targets()
    signs = 1 - 2 * labels.numpy()
    margins = linear_datamodeling_score((scores[..., 0] - scores[..., 1]) * signs, bank)
    expected = reference_lds(
        (predictions[..., 0] - predictions[..., 1]) * signs,
        (truths[..., 0] - truths[..., 1]) * signs,
    )
    np.testing.assert_allclose(margins.values, expected, atol=1e-12)


def test_how_many_columns_are_summed_at_once_changes_nothing(tmp_path, monkeypatch):
    bank = synthetic_bank(tmp_path / "bank")
    whole = linear_datamodeling_score(true_scores().astype(np.float32), bank)
    monkeypatch.setattr(sys.modules["attribution.lds"], "COLUMNS_AT_ONCE", 7)
    pieces = linear_datamodeling_score(true_scores().astype(np.float32), bank)
    np.testing.assert_array_equal(pieces.values, whole.values)


def test_a_bank_trains_each_subset_twice_and_anew(tmp_path):
    task = blobs()
    bank = lds_bank(task, tmp_path / "bank", models=6, seed=0, workers=0)
    np.testing.assert_array_equal(bank.masks[::2], bank.masks[1::2])
    assert len(np.unique(bank.masks, axis=0)) == 3
    assert (bank.masks.sum(1) == TRAIN_ROWS // 2).all()
    assert not np.isclose(bank.outputs[::2], bank.outputs[1::2]).all((1, 2)).any()
    again = lds_bank(task, tmp_path / "again", models=6, seed=0, workers=0)
    np.testing.assert_array_equal(again.outputs, bank.outputs)
    other = lds_bank(task, tmp_path / "other", models=6, seed=1, workers=0)
    assert not np.array_equal(other.masks, bank.masks)
    found = linear_datamodeling_score(np.ones((TRAIN_ROWS, TARGETS)), bank)
    assert np.isnan(found.values).all()
    assert np.isfinite(found.ceiling).all()


def test_a_bank_shares_no_subset_with_models_of_the_same_seed(tmp_path):
    task = blobs()
    bank = lds_bank(task, tmp_path / "bank", models=4, seed=3, workers=0)
    drawn = draw_subsets(task, models=4, design="half", seed=3)
    assert not any((bank.masks == mask).all(1).any() for mask in drawn.masks)
    assert bank.seed != drawn.seed


@pytest.mark.parametrize("design", ["bernoulli", "clusters"])
def test_subsets_of_unlike_sizes_stand_in_order_of_size(tmp_path, design):
    bank = lds_bank(blobs(), tmp_path / "b", models=9, repeats=3, design=design, workers=0)
    sizes = bank.masks.sum(1)
    assert (np.diff(sizes) >= 0).all()
    np.testing.assert_array_equal(bank.masks[::3], bank.masks[2::3])


@pytest.mark.parametrize(("models", "repeats"), [(5, 2), (2, 2), (0, 1), (4, 0)])
def test_numbers_that_make_no_bank_are_refused(tmp_path, models, repeats):
    text = f"^{models} models cannot be {repeats} trainings on each of at least 2 subsets: choose "
    with pytest.raises(ValueError, match=text):
        lds_bank(blobs(), tmp_path / "bank", models=models, repeats=repeats)


def test_banks_that_cannot_rank_are_refused(tmp_path):
    bank = synthetic_bank(tmp_path / "bank", subsets=3)
    zeros = np.zeros((5, TARGETS, 1))
    uneven = write_ensemble(tmp_path / "uneven", line(), bank.masks[:5], zeros)
    with pytest.raises(ValueError, match=r"uneven has subsets trained on 1 to 2 times: LDS needs"):
        linear_datamodeling_score(true_scores(), uneven)
    single = write_ensemble(tmp_path / "single", line(), bank.masks[:2], zeros[:2])
    with pytest.raises(ValueError, match=r"single has 1 subset: LDS ranks models on different"):
        linear_datamodeling_score(true_scores(), single)


def test_scores_that_do_not_fit_are_refused(tmp_path):
    bank, scores = synthetic_bank(tmp_path / "bank"), true_scores()
    with pytest.raises(ValueError, match=r"^expected scores \[train, target\] or .* shape \(37,\)"):
        linear_datamodeling_score(scores[:, 0], bank)
    text = r"^expected scores of shape \(37, 48\), .*, got \(37, 47\): name the columns by targets="
    with pytest.raises(ValueError, match=text):
        linear_datamodeling_score(scores[:, 1:], bank)
    with pytest.raises(ValueError, match=r"^expected scores of shape \(37, 48, 1\), .* 48, 2\)"):
        linear_datamodeling_score(np.stack([scores, scores], axis=2), bank)
    scores[5, 2] = np.nan
    with pytest.raises(ValueError, match=r"^scores hold a value that is not finite at \[5, 2\]$"):
        linear_datamodeling_score(scores, bank)


def test_outputs_that_do_not_fit_are_refused():
    two, text = np.ones((4, 2)), r"^expected predictions and truths of one shape \[subset, target\]"
    for predictions, truths in ((two, two[:3]), (two[:1], two[:1]), (two[:, 0], two[:, 0])):
        with pytest.raises(ValueError, match=text):
            lds(predictions, truths)
    bad = two.copy()
    bad[2, 1] = np.inf
    for pair, name in (((bad, two), "predictions"), ((two, bad), "truths")):
        with pytest.raises(ValueError, match=rf"^{name} hold a value .* not finite at \[2, 1\]$"):
            lds(*pair)
