"""What a purged run predicts, and its sums and lists: as if the rows had not been there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attribution import ForgetSet, GroupNewton, featurize
from attribution.gradients.curvature import train_curvature
from attribution.linear_datamodel import LinearDatamodel
from attribution.moments import input_moments
from attribution.retained import retained_task
from attribution.strongest import strongest
from stores import Store
from tests.attribution.purging.runs import (
    FEW,
    GONE,
    LEFT,
    TARGETS_LEFT,
    change,
)

# -- predictions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["mean", "noise"])
def test_a_datamodel_predicts_the_remaining_rows_bit_for_bit(whole, left, part):
    before, after = (getattr(change(run, "datamodel"), part) for run in (whole, left))
    np.testing.assert_array_equal(after, before[TARGETS_LEFT])
    assert np.abs(before).max() > 0.01
    assert whole.datamodel.shrink == left.datamodel.shrink


@pytest.mark.parametrize("name", ["datamodel-mixed-24", "residual-mixed-24"])
def test_the_std_of_a_datamodel_is_that_of_the_masks_that_are_left(whole, left, name):
    before, after = (LinearDatamodel.open(run.path / name) for run in (whole, left))
    some = ForgetSet.of(left.task, FEW)
    rows = np.flatnonzero(some.mask)
    store = before.store
    variance, lambdas = (store.numpy("variance"), store.constant("lambdas"))
    masks, scales = store.constant("masks")[:, LEFT].astype(float), scales_left(store)
    masks *= scales / store.constant("scales")[LEFT]
    for place, target in enumerate(TARGETS_LEFT):
        penalty = float(lambdas[store.numpy("chosen")[target]])
        own = place if store.constant("free") and place < 33 else None
        bracket = ridge_bracket(masks, scales, penalty, rows, own)
        expected = np.sqrt(variance[target] / penalty * bracket)
        found = after.change(some, targets=np.array([place])).std[0]
        np.testing.assert_allclose(found, expected, rtol=1e-3)


def scales_left(store):
    """Scales of the rows that are left, their squares 1 in the mean of these."""
    alike = store.provenance.settings["method"]["alike"]
    pulls = np.square(store.constant("scales")[LEFT].astype(float)) - alike
    return np.sqrt(alike + (1 - alike) * pulls / pulls.mean())


def ridge_bracket(masks, scales, penalty, rows, free):
    """Posterior variance of the rows' summed effects over noise variance / penalty.

    masks: rotated, each times its row's scale. free: a row whose effect has a flat prior, or None.
    """
    prior = np.diag(np.square(scales))
    if free is not None:
        prior[free, free] = 1e9
    design, wanted = masks / scales, np.zeros(len(scales))
    wanted[rows] = 1
    told = design @ prior @ design.T + penalty * np.eye(len(masks))
    across = design @ prior @ wanted
    return wanted @ prior @ wanted - across @ np.linalg.solve(told, across)


def test_trak_takes_the_mean_effect_of_the_rows_that_are_left_off_each(whole, left):
    before, after = (change(run, "trak") for run in (whole, left))
    np.testing.assert_array_equal(after.noise, before.noise[TARGETS_LEFT])
    effects = Store.open(whole.trak_path / "scores").numpy("effects")[:, TARGETS_LEFT]
    rows = ForgetSet.of(whole.task, FEW).rows
    expected = len(rows) * effects[LEFT].mean(0) - effects[rows].sum(0)
    np.testing.assert_allclose(after.mean, expected, rtol=0, atol=1e-6)
    moved = np.abs(after.mean - before.mean[TARGETS_LEFT]).mean()
    assert 0 < moved < 0.1 * np.abs(before.mean).mean()


def test_what_is_left_of_the_scores_does_not_tell_those_that_are_gone(whole, left):
    before, after = (Store.open(run.trak_path / "scores") for run in (whole, left))
    gone = before.numpy("effects")[GONE, :][:, TARGETS_LEFT].sum(0)
    told = -after.numpy("effects").sum(0)
    assert np.abs(told - gone).mean() > np.abs(gone).mean()


def test_group_newton_predicts_as_if_its_features_had_never_held_the_rows(whole, left, tmp_path):
    task = retained_task(whole.task, ForgetSet.at(whole.task, GONE))
    models = [whole.full.model(i) for i in range(3)]
    models = [replace(model, task=task) for model in models]
    never = GroupNewton(
        task, featurize(task, models, tmp_path / "f"), calibration=left.calibration.newton
    )
    expected, found = never.change(ForgetSet.of(task, FEW)), change(left, "newton")
    for part in ("mean", "std", "noise"):
        wanted = getattr(expected, part)
        np.testing.assert_allclose(
            getattr(found, part), wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=part
        )


@pytest.mark.parametrize("name", ["residual", "combined"])
def test_predictions_with_a_part_of_group_newton_move_little(whole, left, name):
    before, after = (change(run, name).mean for run in (whole, left))
    moved = np.abs(after - before[TARGETS_LEFT])
    assert 0 < moved.mean() < 0.33 * np.abs(before[TARGETS_LEFT]).mean()
    assert moved.max() < 0.4 * np.abs(before).max()


def test_the_calibration_stays(whole, left):
    assert left.calibration == whole.calibration
    assert left.predictors == whole.predictors
    assert left.best == whole.best


# -- sums and lists --------------------------------------------------------------------------------


def test_curvatures_lose_the_rows(left):
    for number, store in enumerate(left.features.stores):
        for kept in Path(left.path.url).glob(f"features/curvature-{number}*"):
            temperature = Store.open(kept).provenance.settings["temperature"]
            anew = train_curvature(left.task, store, temperature)
            found = left.features.curvature(number, temperature)
            np.testing.assert_allclose(found, anew, atol=1e-6 * np.abs(anew).max())


def test_input_moments_lose_the_rows(whole, left):
    inputs, _ = left.task.rows("train", np.arange(len(LEFT)))
    assert len(inputs) == 33
    for index in (0, 5):
        model = left.full.model(index)
        anew = input_moments(left.task.new_model(0), model.state, inputs)
        number = left.moments.find_digest(model.digest())
        for name, values in left.moments.layers([number]).items():
            torch.testing.assert_close(values[0], anew[name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(whole.moments.layers([0])["0"], left.moments.layers([0])["0"])


def test_the_strongest_rows_are_those_of_the_rows_that_are_left(whole, left):
    before, after = (Store.open(run.trak_path / "scores") for run in (whole, left))
    margins = after.numpy("margins")
    np.testing.assert_array_equal(margins, before.numpy("margins")[LEFT][:, TARGETS_LEFT])
    rows, values = strongest(margins, 20)
    np.testing.assert_array_equal(after.numpy("top_rows"), rows)
    np.testing.assert_array_equal(after.numpy("top_values"), values)
    assert np.isin(before.numpy("top_rows"), GONE).any()


def test_the_strongest_rows_of_a_datamodel_are_those_that_are_left(whole, left):
    before, after = whole.datamodel.store, left.datamodel.store
    effects = after.numpy("effects")
    np.testing.assert_array_equal(effects, before.numpy("effects")[LEFT][:, TARGETS_LEFT])
    np.testing.assert_allclose(after.numpy("sum"), effects.sum(0), rtol=1e-4, atol=1e-5)
    margins = (effects * after.numpy("slopes")).sum(2)
    rows, values = strongest(margins, after.numpy("top_rows").shape[2])
    np.testing.assert_array_equal(after.numpy("top_rows"), rows)
    np.testing.assert_allclose(after.numpy("top_values"), values, rtol=1e-6)
    assert np.isin(before.numpy("top_rows"), GONE).any()


def test_the_spread_of_trak_over_checkpoints_is_that_of_the_rows_that_are_left(whole, left):
    j = [whole.features.gather(c, np.array(TARGETS_LEFT)) for c in range(3)]
    solved = [Store.open(whole.trak_path / f"rows-{c}").numpy("rows")[LEFT] for c in range(3)]
    scores = -np.stack(
        [np.einsum("rk,tok->rto", r.astype(float), one) for r, one in zip(solved, j, strict=True)]
    )
    for row in range(len(LEFT)):  # training rows come first among the targets too
        scores[:, row, row] = 0
    store = Store.open(left.trak_path / "scores")
    expected = {
        "row_variance": scores.var(0, ddof=1).sum(0),
        "sum_variance": scores.sum(1).var(0, ddof=1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(
            store.numpy(name), values, rtol=1e-4, atol=1e-5 * values.max(), err_msg=name
        )


def test_the_factor_of_a_curvature_with_the_rows_goes(left):
    with pytest.raises(ValueError, match="'factor'"):
        Store.open(left.trak_path / "rows-0").constant("factor")


@pytest.mark.parametrize("name", ["datamodel-mixed-24", "residual-mixed-24"])
def test_masks_that_are_left_tell_nothing_of_those_that_are_gone(whole, left, name):
    before, after = (Store.open(run.path / name) for run in (whole, left))
    assert {"basis", "longest", "maps"} <= set(before._root["constants"])
    assert sorted(after._root["constants"]) == ["eigenvalues", "free", "lambdas", "masks", "scales"]
    scales = after.constant("scales")
    np.testing.assert_allclose(scales, scales_left(before), rtol=1e-5)
    assert np.square(scales).mean() == pytest.approx(1, abs=1e-5)
    assert np.square(before.constant("scales")[LEFT]).mean() != pytest.approx(1, abs=1e-3)
    old, new = before.constant("masks").copy(), after.constant("masks")
    eigenvalues = np.diag(before.constant("eigenvalues"))
    missing = eigenvalues - old[:, LEFT] @ old[:, LEFT].T
    np.testing.assert_allclose(missing, old[:, GONE] @ old[:, GONE].T, atol=1e-4)
    old[:, LEFT] *= scales / before.constant("scales")[LEFT]
    np.testing.assert_allclose(new @ new.T, np.diag(after.constant("eigenvalues")), atol=1e-4)
    np.testing.assert_allclose(new.T @ new, old[:, LEFT].T @ old[:, LEFT], atol=1e-4)
