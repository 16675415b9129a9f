import shutil

import numpy as np
import pytest
import torch

from attribution import (
    ForgetSet,
    LinearDatamodel,
    Model,
    Ridge,
    draw_subsets,
    fit_datamodels,
    ridge_datamodels,
    uncertainty,
)
from attribution.regression import problem
from attribution.seeds import generator
from stores import ArraySpec, Provenance, Store, StoreSpec
from tests.attribution.datamodel_cases import (
    ANCHORS,
    LAMBDAS,
    OUTPUTS,
    RIDGE,
    TARGETS,
    TRAIN,
    half_masks,
    linear,
    made,
    noisy,
    write_pair,
)
from tests.old_stores import forget_scales
from tests.references import (
    datamodel_objective,
    datamodel_posterior_variance,
    dense_datamodel,
    expected_effects,
)
from tests.tasks import blobs, write_ensemble


@pytest.fixture(scope="module")
def task():
    return blobs(rows=TRAIN, test_rows=TARGETS - TRAIN)


@pytest.fixture(scope="module", params=[(38, None), (38, False), (11, None), (11, True)], ids=str)
def kind(request):
    """Number of models, more and fewer than rows, and whether own rows are free."""
    return request.param


@pytest.fixture(scope="module")
def method(kind):
    return Ridge(LAMBDAS, free=kind[1])


@pytest.fixture(scope="module")
def noisy_pair(kind, task, tmp_path_factory):
    judges = np.arange(kind[0]) % 3 != 0
    return made(tmp_path_factory.mktemp("noisy"), task, noisy, kind[0], judges)


@pytest.fixture(scope="module")
def fitted(noisy_pair, method, tmp_path_factory):
    ensemble, anchor = noisy_pair
    to = tmp_path_factory.mktemp("fitted") / "datamodel"
    return fit_datamodels(ensemble, anchor=anchor, to=to, method=method, dtype="float64", seed=3)


class Reference:
    """The same fit by dense regressions, target by target."""

    def __init__(self, ensemble, anchor, seed, free=None):
        self.ensemble, self.anchor = ensemble, anchor.outputs.mean(0)
        self.scales = expected_effects(ensemble.task, anchor.outputs, RIDGE.alike)
        self.masks = np.concatenate([ensemble.masks, np.ones((1, TRAIN))]).astype(float)
        self.outputs = np.concatenate([ensemble.outputs, self.anchor[None]])
        self.weights = np.append(np.ones(len(ensemble)), len(anchor))
        self.lambdas = np.array(LAMBDAS) * self.mean_eigenvalue()
        order = generator(seed, "held-out models").permutation(len(ensemble))
        kinds = [[m for m in order if ensemble.judges[m] == kind] for kind in (True, False)]
        self.held = np.array(sorted(m for kind in kinds for m in kind[: -(-len(kind) // 5)]))
        self.kept = np.setdiff1d(np.arange(len(self.masks)), self.held)
        self.cases = [(t, o) for t in range(TARGETS) for o in range(OUTPUTS)]
        self.free = free
        if free is None:
            errors = {choice: self.judges_error(choice) for choice in (False, True)}
            self.free = errors[True] < errors[False]

    def mean_eigenvalue(self):
        around = self.masks - np.average(self.masks, 0, self.weights)
        scaled = np.sqrt(self.weights)[:, None] * around * self.scales
        return np.square(scaled).sum() / np.linalg.matrix_rank(scaled)

    def regress(self, models, target, output, penalty):
        chosen = self.masks[models], self.outputs[models, target, output], self.weights[models]
        return dense_datamodel(*chosen, penalty, self.scales, self.own(target))

    def own(self, target):
        return target if self.free and target < TRAIN else None

    def held_out_errors(self, target, penalty):
        """Squared error of each held-out model."""
        error = np.zeros(len(self.held))
        for output in range(OUTPUTS):
            intercept, effects = self.regress(self.kept, target, output, penalty)
            found = intercept + self.masks[self.held] @ effects
            error += np.square(self.outputs[self.held, target, output] - found)
        return error

    def judges_error(self, free):
        """Of training rows, with the lambda that predicts all held-out models best."""
        self.free, judging = free, self.ensemble.judges[self.held]
        error = 0.0
        for target in range(TRAIN):
            each = [self.held_out_errors(target, penalty) for penalty in self.lambdas]
            error += min(each, key=np.sum)[judging].sum()
        return error

    def chosen(self):
        errors = [
            [self.held_out_errors(target, penalty).sum() for penalty in self.lambdas]
            for target in range(TARGETS)
        ]
        return np.argmin(errors, 1)

    def shrink(self, chosen):
        """Least squares of the judging models' change on the own rows' and the others' part."""
        judging = self.held[self.ensemble.judges[self.held]]
        removed = self.masks[judging] - 1
        own_parts, other_parts, truths = [], [], []
        for target, output in self.cases:
            penalty = self.lambdas[chosen[target]]
            _, effects = self.regress(self.kept, target, output, penalty)
            mine = np.zeros(len(judging))
            if target < TRAIN:
                mine = removed[:, target] * effects[target]
            own_parts.append(mine)
            other_parts.append(removed @ effects - mine)
            truths.append(self.outputs[judging, target, output] - self.anchor[target, output])
        parts = np.stack([np.concatenate(own_parts), np.concatenate(other_parts)], 1)
        return np.linalg.lstsq(parts, np.concatenate(truths))[0]


@pytest.fixture(scope="module")
def reference(noisy_pair, method):
    return Reference(*noisy_pair, seed=3, free=method.free)


def test_own_rows_are_free_where_that_predicts_judges_better(fitted, reference):
    assert bool(fitted.store.constant("free")) == reference.free


def test_each_target_gets_the_lambda_with_the_least_held_out_error(fitted, reference):
    chosen = fitted.store.numpy("chosen")
    np.testing.assert_array_equal(chosen, reference.chosen())
    assert len(set(chosen)) > 1


def test_effects_equal_dense_regressions(fitted, reference):
    effects, own = fitted.store.numpy("effects"), fitted.store.numpy("own")
    everything = np.arange(len(reference.masks))
    for target, output in reference.cases:
        penalty = reference.lambdas[reference.chosen()[target]]
        _, expected = reference.regress(everything, target, output, penalty)
        np.testing.assert_allclose(effects[:, target, output], expected, rtol=0, atol=1e-8)
        mine = expected[target] if target < TRAIN else 0
        np.testing.assert_allclose(own[target, output], mine, rtol=0, atol=1e-8)


def test_shrink_factors_are_fitted_on_held_out_judges(fitted, reference):
    expected = reference.shrink(reference.chosen())
    np.testing.assert_allclose(fitted.shrink, np.maximum(expected, 0), rtol=0, atol=1e-8)
    assert min(fitted.shrink) > 0


def test_the_judges_of_few_mixed_models_are_not_all_fitted(task, tmp_path):
    """Two of ten models may judge; without one held out nothing tells the shrink factors."""
    subsets = draw_subsets(task, models=10, design="mixed", seed=2)
    assert subsets.judges.sum() == 2
    masks = np.concatenate([subsets.masks, np.ones((ANCHORS, TRAIN), dtype=bool)])
    outputs = noisy(masks, np.random.default_rng(8))
    ensemble, anchor = write_pair(tmp_path, task, masks, outputs, subsets.judges)
    options = {"method": RIDGE, "dtype": "float64", "to": tmp_path / "datamodel"}
    for seed in range(3):
        reference = Reference(ensemble, anchor, seed)
        judging = reference.held[subsets.judges[reference.held]]
        assert (len(reference.held), len(judging)) == (3, 1)
        assert not subsets.masks[judging].all()
        options["to"] = tmp_path / f"datamodel-{seed}"
        found = fit_datamodels(ensemble, anchor=anchor, seed=seed, **options).shrink
        expected = np.maximum(reference.shrink(reference.chosen()), 0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)
        assert np.isfinite(found).all()
        assert max(found) > 0


@pytest.mark.parametrize("rows", [[0], [4, 12], [0, 1, 2, 3, 9, 11]])
def test_changes_are_shrunk_sums_of_effects(task, fitted, rows):
    found = fitted.change(ForgetSet.at(task, rows)).mean
    effects = fitted.store.numpy("effects")
    own_factor, other_factor = fitted.shrink
    for target in range(TARGETS):
        factors = [own_factor if row == target else other_factor for row in rows]
        expected = -np.tensordot(factors, effects[rows, target], 1)
        np.testing.assert_allclose(found[target], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [[0], [4, 12], [0, 1, 2, 3, 9, 11]])
def test_stds_are_those_of_a_bayesian_regression(task, fitted, reference, rows):
    found = fitted.change(ForgetSet.at(task, rows)).std
    for target, output in reference.cases:
        penalty, scales = reference.lambdas[reference.chosen()[target]], reference.scales
        data = (reference.masks, reference.outputs[:, target, output], reference.weights)
        own = reference.own(target)
        noise = datamodel_objective(*data, penalty, scales, own) / (len(reference.masks) - 1)
        scale = datamodel_posterior_variance(data[0], data[2], penalty, rows, scales, own)
        assert found[target, output] == pytest.approx((noise * scale) ** 0.5, rel=1e-5)


def test_stds_are_the_same_whatever_is_looked_at_together(task, fitted, monkeypatch):
    forgets = [ForgetSet.at(task, rows) for rows in ([0, 1, 2, 3, 9, 11], [4])]
    expected = [fitted.change(forget).std for forget in forgets]
    monkeypatch.setattr(uncertainty, "_MASKS", 4 * len(fitted.store.map_constant("masks")))
    for forget, std in zip(forgets, expected, strict=True):
        np.testing.assert_allclose(fitted.change(forget).std, std, rtol=1e-6)
    nothing = fitted.change(forgets[1], already=forgets[1])
    assert not nothing.std.any()


def test_noise_is_the_spread_of_the_full_models(task, fitted, noisy_pair):
    found = fitted.change(ForgetSet.at(task, [3]), targets=np.array([16, 0])).noise
    expected = noisy_pair[1].outputs.std(0, ddof=1)[[16, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_targets_select_rows_of_the_change(task, fitted):
    forget, places = ForgetSet.at(task, [3, 8]), np.array([14, 3, 0])
    whole, some = fitted.change(forget), fitted.change(forget, targets=places)
    for name in ("mean", "std", "noise"):
        np.testing.assert_allclose(getattr(some, name), getattr(whole, name)[places], atol=1e-6)


def test_rows_that_are_gone_already_drop_out(task, fitted):
    some, gone = ForgetSet.at(task, [3, 8]), ForgetSet.at(task, [5, 8])
    found = fitted.change(some.union(task, gone), already=gone)
    expected = fitted.change(ForgetSet.at(task, [3]))
    np.testing.assert_array_equal(found.mean, expected.mean)
    np.testing.assert_array_equal(found.std, expected.std)
    nothing = fitted.change(gone, already=gone)
    assert not nothing.mean.any()
    assert not nothing.std.any()


def test_predictions_start_from_the_model(task, fitted):
    model = Model(task, task.new_model(0).state_dict(), ForgetSet.at(task, [3]))
    found = fitted.predict(model, ForgetSet.at(task, [8]), ["test-1", "train-8"])
    expected = fitted.change(ForgetSet.at(task, [8]), targets=np.array([14, 8]))
    np.testing.assert_allclose(found.mean, model.outputs([14, 8]) + expected.mean, atol=1e-6)


def test_effects_of_noise_free_outputs_are_exact(task, tmp_path):
    # Subsets of one size alone leave a shift open (see test_ridge); the anchor closes it.
    ensemble, anchor = made(tmp_path, task, lambda masks, random: linear(masks, random)[1])
    random = np.random.default_rng(5)
    half_masks(38, random)
    effects, _ = linear(np.ones((1, TRAIN)), random)
    to = tmp_path / "datamodel"
    found = fit_datamodels(ensemble, anchor=anchor, to=to, method=Ridge((1e-9,)), dtype="float64")
    np.testing.assert_allclose(found.store.numpy("effects"), effects, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.shrink, 1, rtol=0, atol=1e-6)
    change = found.change(ForgetSet.at(task, [0, 5, 7]))
    np.testing.assert_allclose(change.mean, -effects[[0, 5, 7]].sum(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(change.std, 0, rtol=0, atol=1e-3)
    np.testing.assert_allclose(change.noise, 0, rtol=0, atol=1e-12)


def test_own_rows_are_judged_alike_however_many_are_looked_at(noisy_pair, fitted, monkeypatch):
    monkeypatch.setattr(ridge_datamodels, "ROWS", 5)
    method = Ridge(LAMBDAS, free=fitted.store.provenance.settings["method"]["free"])
    found = method.constants(problem(*noisy_pair, 3, torch.float64))
    for name in ("free", "scales", "masks", "maps"):
        np.testing.assert_array_equal(found[name], fitted.store.constant(name))


def test_effects_of_an_older_version_are_refused(fitted, tmp_path):
    shutil.copytree(fitted.store.path, tmp_path / "old")
    forget_scales(tmp_path / "old")
    text = (
        r"old was fitted by an older version.* remove it and fit it anew; for a run, dmm precompute"
    )
    with pytest.raises(ValueError, match=text):
        LinearDatamodel.open(tmp_path / "old")


def test_float32_is_close(noisy_pair, method, fitted, tmp_path):
    ensemble, anchor = noisy_pair
    to = tmp_path / "datamodel"
    found = fit_datamodels(ensemble, anchor=anchor, to=to, method=method, seed=3)
    for name in ("effects", "own", "variance"):
        expected = fitted.store.numpy(name)
        np.testing.assert_allclose(found.store.numpy(name), expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found.store.numpy("chosen"), fitted.store.numpy("chosen"))


def test_ensembles_that_do_not_fit_are_refused(task, noisy_pair, tmp_path):
    ensemble, anchor = noisy_pair
    to = tmp_path / "x"
    with pytest.raises(ValueError, match=r"all models of .*full saw the same rows"):
        fit_datamodels(anchor, anchor=anchor, to=to)
    with pytest.raises(ValueError, match=r"the anchor .*subsets must hold models trained on all"):
        fit_datamodels(ensemble, anchor=ensemble, to=to)
    for rows, tests, axis in ((12, 5, "train"), (13, 5, "target")):
        other = blobs(rows=rows, test_rows=tests)
        outputs = np.zeros((2, rows + tests, OUTPUTS))
        stranger = write_ensemble(tmp_path / axis, other, np.ones((2, rows), bool), outputs)
        with pytest.raises(ValueError, match=f"were made from different {axis} rows"):
            fit_datamodels(ensemble, anchor=stranger, to=to)
    single = write_ensemble(tmp_path / "single", task, anchor.masks[:1], anchor.outputs[:1])
    with pytest.raises(ValueError, match=r"single holds 1 model: the spread .* needs 2"):
        fit_datamodels(ensemble, anchor=single, to=to)
    assert not to.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be 'float16', 'float32', 'float64', got 'int8'"),
        ({"top": 0}, "top must be 1 or more, got 0"),
    ],
)
def test_unusable_options_are_refused(noisy_pair, tmp_path, options, message):
    ensemble, anchor = noisy_pair
    with pytest.raises(ValueError, match=message):
        fit_datamodels(ensemble, anchor=anchor, to=tmp_path / "x", **options)


def test_another_fit_in_the_same_folder_is_refused(noisy_pair, method, fitted):
    ensemble, anchor = noisy_pair
    options = {"method": method, "dtype": "float64", "to": fitted.store.path}
    with pytest.raises(ValueError, match=r"seed: stored 3, wanted 4"):
        fit_datamodels(ensemble, anchor=anchor, seed=4, **options)


def test_forget_sets_of_other_data_are_refused(fitted):
    forget = ForgetSet.at(blobs(rows=9), [3])
    with pytest.raises(ValueError, match="drawn from 9 rows, the datamodel has 13"):
        fitted.change(forget)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train", "its row 5 is 'train-5', the task's is 'train-7'"),
        ("test", "its target 14 is 'test-1', the task's is 'test-3'"),
    ],
)
def test_a_task_whose_rows_stand_in_another_order_is_refused(task, fitted, split, message):
    ids = {"train": list(task.train_ids), "test": list(task.test_ids)}
    first = {"train": 5, "test": 1}[split]
    ids[split][first:] = ids[split][first + 2 :] + ids[split][first : first + 2]
    given = {f"{name}_ids": row_ids for name, row_ids in ids.items()}
    other = blobs(rows=TRAIN, test_rows=TARGETS - TRAIN, **given)
    model = Model(other, other.new_model(0).state_dict())
    with pytest.raises(ValueError, match=f"other rows than those of task 'blobs': {message}$"):
        fitted.predict(model, ForgetSet.at(other, [3]))


def test_other_stores_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a store at"):
        LinearDatamodel.open(tmp_path / "none")
    spec = StoreSpec("masks", "model", 1, {"mask": ArraySpec(("model",), (2,), "bool")})
    Store.create(tmp_path / "masks", spec, Provenance({}))
    with pytest.raises(ValueError, match="masks"):
        LinearDatamodel.open(tmp_path / "masks")
